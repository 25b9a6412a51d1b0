"""Two processes of each engine against one process of plain torch: the same losses, gradients and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.loading import load_causal_lm
from tests.support.engine_cases import BF16, CASES, FP32, frozen_logprobs, has_checkpoint, name_of, train, training_of

pytestmark = pytest.mark.deepspeed
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder with the results of two processes in every case, and of one process that resumed from their checkpoints."""
    folder = tmp_path_factory.mktemp("many")
    program = ["-m", "tests.support.engine_cases", str(folder), str(tiny_model)]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable, *two, *program], [sys.executable, *program]):
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def numbers_of(folder: Path, name: str) -> list[dict[str, float]]:
    numbers: list[dict[str, float]] = json.loads((folder / f"{name}.json").read_text())
    return numbers


@pytest.mark.parametrize(("kind", "engine", "changes", "dtype"), CASES, ids=[name_of(*case) for case in CASES])
def test_two_processes_train_like_one(
    found: Path, tiny_model: Path, kind: str, engine: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    name = name_of(kind, engine, changes, dtype)
    numbers, weights = train(kind, tiny_model, training_of("torch"), dtype)
    theirs = load_file(found / f"{name}.safetensors")
    assert theirs.keys() == weights.keys()
    for ours, other in zip(numbers, numbers_of(found, name), strict=True):
        # bf16: weights are rounded copies of fp32 masters there, and fp32 weights in bf16 products here.
        assert other == pytest.approx(ours, rel=1e-5 if dtype == FP32 else 0.04)
    gaps = torch.cat([(weights[key] - theirs[key]).abs().flatten() for key in weights])
    before = dict(load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32).named_parameters())
    moved = torch.cat([(weights[key] - before[key]).abs().flatten() for key in weights if key in before])
    assert moved.mean() > (1e-4 if kind == "adapters" else 5e-3)  # the weights really changed
    if dtype == FP32:
        assert gaps.max() < 2e-5
        assert gaps.mean() < 1e-6
    else:  # Adam's first steps are the sign of the gradient: where that is all rounding, they differ by a whole step
        assert gaps.mean() < 0.1 * moved.mean()


@pytest.mark.parametrize("case", [case for case in CASES if has_checkpoint(*case)], ids=lambda case: name_of(*case))
def test_one_process_resumes_from_a_checkpoint_of_two(found: Path, case: Any) -> None:
    two, one = (load_file(found / f"{name_of(*case)}{end}.safetensors") for end in ("", "-alone"))
    assert max((two[key] - one[key]).abs().max().item() for key in two) < 2e-5
    assert numbers_of(found, f"{name_of(*case)}-alone")[0] == pytest.approx(
        numbers_of(found, name_of(*case))[2], rel=1e-5
    )


def test_checkpoint_shards_are_split_over_the_ranks(found: Path) -> None:
    folder = found / f"{name_of('actor', 'deepspeed', {'zero_stage': 3}, FP32)}-checkpoint"
    parts = [set(load_file(path)) - {"steps_done"} for path in sorted(folder.iterdir())]
    assert len(parts) == 2 and not parts[0] & parts[1]
    assert min(map(len, parts)) > 0.4 * max(map(len, parts))


def test_sharded_frozen_model_gives_the_same_output(found: Path, tiny_model: Path) -> None:
    expected = frozen_logprobs(tiny_model, training_of("torch"), SINGLE_PROCESS)
    assert torch.allclose(load_file(found / "frozen.safetensors")["logprobs"], expected, atol=1e-6)


def test_every_case_covers_zero_stages_1_to_3_in_both_precisions() -> None:
    stages = {(changes.get("zero_stage"), dtype) for kind, _, changes, dtype in CASES if kind == "actor"}
    assert {(stage, dtype) for stage in (1, 2, 3) for dtype in (FP32, BF16)} <= stages
