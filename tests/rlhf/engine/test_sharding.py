"""Models of which ZeRO-3 really shards the weights, with ranks that use the head different numbers of times, against one process."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from components.rlhf.data.microbatches import local_microbatches
from tests.support.engine_cases import FP32, Numbers
from tests.support.sharding_cases import (
    BATCHES,
    CASES,
    MAX_TOKENS,
    NUM_RANKS,
    PIECE,
    Case,
    expert_steps,
    make_models,
    run,
)

pytestmark = pytest.mark.deepspeed
# Numbers of a case that are computed before its first update.
UNTRAINED = ("loss", "router_loss", "logprobs", "entropy", "values", "scores")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """The folder with the results of two processes in every case."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.support.sharding_cases", str(folder), str(models)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@functools.cache
def in_one_process(models: Path, name: str, kind: str, dtype: torch.dtype) -> tuple[Numbers, dict[str, Tensor]]:
    return run(Case(model=name, kind=kind, zero_stage=1, dtype=dtype), models)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_sharded_steps_equal_those_of_one_process(found: Path, models: Path, case: Case) -> None:
    numbers, weights = in_one_process(models, case.model, case.kind, case.dtype)
    theirs = json.loads((found / f"{case.name}.json").read_text())
    if case.dtype == FP32:
        for ours, other in zip(numbers, theirs, strict=True):
            assert other == pytest.approx(ours, rel=1e-4, abs=1e-5)
    # bf16: DeepSpeed rounds all weights, torch those of linear layers, so that numbers drift apart after the first update, by an
    # amount that depends on the processor (a router may choose another expert). The weights are compared at the end.
    untrained = {name: numbers[0][name] for name in UNTRAINED if name in numbers[0]}
    exact = dict(rel=1e-5, abs=1e-6) if case.dtype == FP32 else dict(rel=0.01, abs=0.05)
    assert {name: theirs[0][name] for name in untrained} == pytest.approx(untrained, **exact)
    assert theirs[0].get("largest_kl", 0.0) == 0.0  # before any update, in both precisions
    assert theirs[-1].get("largest_kl", 1.0) > 0.01  # after it
    their_weights = load_file(found / f"{case.name}.safetensors")
    assert their_weights.keys() == weights.keys()
    gap, moved = (mean_gap(weights, others) for others in (their_weights, before_training(models / case.model)))
    assert gap < (1e-4 if case.dtype == FP32 else 0.5) * moved  # Adam's first step is the sign even of a rounding error


def test_ranks_may_use_different_experts_of_a_list(found: Path) -> None:
    weights, theirs = expert_steps(), load_file(found / "experts.safetensors")
    assert theirs.keys() == weights.keys()
    for name, weight in weights.items():
        # A step of Adam moves a weight by up to 1e-2, and a rounding error by a little.
        torch.testing.assert_close(theirs[name], weight, rtol=0.0, atol=1e-4)


def mean_gap(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Of the weights that both have; a saved model has a tied head once."""
    gaps = [(weights[key] - others[key]).abs().flatten() for key in weights.keys() & others.keys()]
    return torch.cat(gaps).mean().item()


def before_training(folder: Path) -> dict[str, Tensor]:
    """The weights below the heads."""
    weights = {}
    for trained, name in (("actor", "sft"), ("critic", "reward")):
        model = AutoModel.from_pretrained(folder / name)
        weights |= {f"{trained}.{model.base_model_prefix}.{key}": weight for key, weight in model.state_dict().items()}
    return weights


@pytest.mark.parametrize("number", range(len(BATCHES)))
def test_ranks_need_different_numbers_of_pieces(number: int) -> None:
    """The second batch leaves rank 1 without a response token, the third leaves rank 0 with one text less."""
    batch = BATCHES[number]
    lengths = [len(prompt) + len(response) for prompt, response in batch]
    pieces = []
    for rank in range(NUM_RANKS):
        parts = local_microbatches(lengths, MAX_TOKENS, rank=rank, world_size=NUM_RANKS, max_over_ranks=int)
        pieces.append([-(-sum(len(batch[i][1]) for i in rows) // PIECE) for rows, _ in parts])
    assert pieces == [[[1, 5], [1, 4]], [[4], [0]], [[4], [1, 4]]][number]
