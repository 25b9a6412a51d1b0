"""Under ZeRO-3 a model is loaded and exported weight by weight: the same weights, and never a whole model in a process."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.loading_ranks import WARM_UP, make_folder, make_reward_model
from tests.support.sharded_loading import NOT_BUILT
from tests.support.tiny_models import causal_lm_types

pytestmark = pytest.mark.deepspeed
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Objects of DeepSpeed and of the modules, buffers, and pages that the allocator has not returned.
CONSTANT = 16 * 2**20
ABOUT_100M = dict(
    hidden_size=1024, intermediate_size=2816, num_layers=4, vocab_size=24_000
)  # of each of the four models


def run(*arguments: str | Path) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("architectures") / "problems.json"
    run("-m", "tests.support.sharded_loading", out)
    found: dict[str, str] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("kind", causal_lm_types())
def test_sharded_model_equals_a_whole_one_and_so_does_its_export(problems: dict[str, str], kind: str) -> None:
    if problems[kind] == NOT_BUILT:
        pytest.skip("transformers cannot build it")
    assert problems[kind] == ""


def test_most_architectures_are_built(problems: dict[str, str]) -> None:
    assert list(problems.values()).count(NOT_BUILT) < 10


def test_first_steps_are_bitwise_those_of_models_that_are_loaded_whole(tiny_model: Path, tmp_path: Path) -> None:
    run(*TWO, "-m", "tests.support.loading_ranks", "steps", "fp32", tiny_model, tmp_path)
    for rank in range(2):
        same = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(same) == 4
        assert all(same.values()), same


@functools.cache
def models_in(folder: Path, dtype: torch.dtype) -> Path:
    for size, shape in (("small", WARM_UP), ("large", ABOUT_100M)):
        sft = make_folder(folder / size / "sft", dtype, **shape)
        make_reward_model(sft, folder / size / "reward", dtype)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_in(tmp_path_factory.mktemp("models"), torch.float32)


@pytest.mark.parametrize("kind", ["ppo", "model"])
def test_loading_takes_at_most_the_shards_and_one_tensor(models: Path, tmp_path: Path, kind: str) -> None:
    """Anonymous memory of each of two processes, from fp32 files into bf16; "ppo" loads four models one after another."""
    run(*TWO, "-m", "tests.support.loading_ranks", kind, "bf16", models, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        bound = found["shard"] + found["largest"] + CONSTANT
        assert bound < 0.9 * found["model"]
        assert found["loading"] <= bound, found
        if kind == "model":
            # Gloo, which replaces NCCL on CPUs, copies a tensor that it gathers up to twice and a half.
            assert found["exporting"] <= 3.5 * found["largest"] + CONSTANT < found["model"], found
