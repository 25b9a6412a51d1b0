"""Training on preferences in two processes, under every engine, against one process, and after a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.rlhf.engine.group import SINGLE_PROCESS
from tests.support.dpo_ranks import CASES, Case, run, trainer_of, weights_of

pytestmark = pytest.mark.deepspeed
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder with the results of two processes in every case."""
    folder = tmp_path_factory.mktemp("dpo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.support.dpo_ranks", str(folder), str(tiny_model)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_two_processes_train_like_one(found: Path, tiny_model: Path, case: Case) -> None:
    start = dict(trainer_of(case, tiny_model, SINGLE_PROCESS).actor.named_parameters())
    trainer, numbers = run(case, tiny_model)
    weights = weights_of(trainer)
    their_numbers, history = json.loads((found / f"{case.name}.json").read_text())
    theirs = {
        name.removeprefix("whole/"): w
        for name, w in load_file(found / f"{case.name}.safetensors").items()
        if name.startswith("whole/")
    }
    assert theirs.keys() == weights.keys()
    tolerance = dict(rel=1e-4, abs=1e-4) if case.precision == "fp32" else dict(rel=0.2, abs=0.3)
    assert their_numbers == pytest.approx(numbers, **tolerance)
    for ours, other in zip(trainer.history, history, strict=True):
        del ours["computed_per_real_token"], other["computed_per_real_token"]
        if ours["step"] == 1:  # all rewards are 0, but for rounding
            del ours["accuracy"], other["accuracy"]
        assert other == pytest.approx(ours, **tolerance)
    gap = torch.cat([(weights[name].float() - theirs[name].float()).abs().flatten() for name in weights]).mean()
    moved = torch.cat([(weights[name] - start[name].detach()).abs().flatten() for name in weights]).mean()
    assert gap < (1e-3 if case.precision == "fp32" else 0.3) * moved


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_resumed_run_equals_an_uninterrupted_one(found: Path, case: Case) -> None:
    tensors = load_file(found / f"{case.name}.safetensors")
    names = [name.removeprefix("whole/") for name in tensors if name.startswith("whole/")]
    assert names
    assert all(torch.equal(tensors[f"whole/{name}"], tensors[f"resumed/{name}"]) for name in names)
