"""Fixtures for all tests, and the tiers.

make test runs everything that is not marked slow or vllm: tiny random models on a CPU, no network. make test-all adds the slow
ones (the real model and ratings, and the commands of the README) and those that start vLLM.

Hypothesis tries the same examples every time, so that a change of the code alone makes a test red. HYPOTHESIS_PROFILE=search tries
others: make test HYPOTHESIS_PROFILE=search.
"""

import functools
import inspect
import os

# Before torch is imported anywhere: threads that spin on a busy core stall torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # each has its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.tiny_model import make_tiny_model

# kfp asks for the stack 50 times a pipeline, only to read a name; where torch is loaded, finding the lines of its source takes seconds.
inspect.stack = functools.partial(inspect.stack, context=0)

settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer Llama in fp32 and a byte-level tokenizer whose PAD is its EOS."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)
