"""Fixtures for all tests, and the tiers.

make test runs everything that is not marked slow, vllm, deepspeed or browser: tiny random models on a CPU, no network. make test-all adds
the slow tests (the real model and ratings, and the commands of the README) and those that start vLLM, DeepSpeed or a browser.

Hypothesis tries the same examples every time, so that only a change of the code makes a test fail. HYPOTHESIS_PROFILE=search tries
others: make test HYPOTHESIS_PROFILE=search.
"""

import inspect
import os
import sys

# Set before torch is imported: threads that spin on a busy core stall torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # each worker gets its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from components.rlhf.checkpoints.lease import Lease
from tests.support.resident import Resident
from tests.support.tiny_model import make_tiny_model


def _stack(context: int = 1) -> list[inspect.FrameInfo]:
    """inspect.stack without source lines and their files, which are looked for in all modules that are loaded.

    kfp asks for it 50 times per pipeline, to read the name of a function.
    """
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append(
            inspect.FrameInfo(frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None)
        )
        frame = frame.f_back  # type: ignore[assignment]
    return frames


inspect.stack = _stack

settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Files that take minutes start first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_movie_reviews.py", "test_vllm.py", "test_gpu_params.py", "test_engines_of_readme.py", "test_faults.py",
    "test_two_nodes.py", "test_policies.py", "test_sweep.py", "test_calculator.py",
    "test_lost_process.py", "test_resume.py", "test_engines.py", "test_whole_run.py", "test_multi_process.py", "test_sharding.py",
    "test_every_architecture.py", "test_vllm_architectures.py",
    "test_dag.py", "test_trainer.py", "test_random_walks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def heartbeats_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A lease that a test leaves behind stops beating, or its thread would slow down all later tests."""
    leases: list[Lease] = []
    acquire = Lease.acquire

    def remember(lease: Lease) -> None:
        leases.append(lease)
        acquire(lease)

    monkeypatch.setattr(Lease, "acquire", remember)
    yield
    for lease in leases:
        lease._stop.set()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer Llama in fp32 and a byte-level tokenizer whose PAD is its EOS."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture(scope="session")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    """Runs Python modules in forks of a process that has imported everything."""
    resident = Resident(tmp_path_factory.mktemp("resident"))
    yield resident
    resident.close()
