"""The training stages in two processes against one process: the same models, curves and validation numbers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

pytestmark = pytest.mark.deepspeed
STAGES = ("sft", "reward_model", "ppo")
UNSHARED = ["model.num_frozen_layers=0"]
SHARDED = [
    *UNSHARED,
    *(f"{stage}.training.{key}" for stage in STAGES for key in ("engine=deepspeed", "zero_stage=3", "num_processes=2")),
    "evaluation.num_processes=2",
]


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return write_params(folder / "toy.yaml", toy_params(tiny_model, write_data(folder)))


def run_pipeline(resident: Resident, params: Path, name: str, settings: list[str]) -> Path:
    out = params.parent / name
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(out), *options]
    done = resident.run(command, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def one(resident: Resident, params: Path) -> Path:
    """The run directory of a run whose stages train in one process, with torch."""
    return run_pipeline(resident, params, "one", UNSHARED)


@pytest.fixture(scope="module")
def two(resident: Resident, params: Path) -> Path:
    """The run directory of a run whose stages train in two processes, with DeepSpeed."""
    return run_pipeline(resident, params, "two", SHARDED)


def output(run: Path, stage: str) -> Path:
    (found,) = (run / "artifacts").glob(f"*/{stage}/model")
    return found


@pytest.mark.parametrize("stage", ["sft", "reward-model", "ppo"])
def test_sharded_training_in_two_processes_yields_the_same_model(one: Path, two: Path, stage: str) -> None:
    expected, found = (load_file(output(run, stage) / "model.safetensors") for run in (one, two))
    assert expected.keys() == found.keys()
    gaps = torch.cat([(expected[name] - found[name]).abs().flatten() for name in expected])
    assert gaps.max() < 2e-4 and gaps.mean() < 1e-5


def test_policy_of_sharded_training_loads_in_transformers(two: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(two / "model")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_history_and_validation_cover_the_rows_of_both_processes(one: Path, two: Path) -> None:
    for name in ("history.jsonl", "validation.jsonl"):
        expected, found = (
            [json.loads(line) for line in (output(run, "ppo") / name).read_text().splitlines()] for run in (one, two)
        )
        assert len(expected) == len(found) > 0
        for a, b in zip(expected, found, strict=True):
            same = {key: value for key, value in a.items() if isinstance(value, float) and "seconds" not in key}
            assert {key: b[key] for key in same} == pytest.approx(same, rel=1e-3, abs=2e-4)
    assert json.loads((two / "summary.json").read_text())["stages"]["ppo"]["status"] == "succeeded"


def test_calibration_and_evaluation_in_two_processes_yield_the_same_numbers(one: Path, two: Path) -> None:
    expected, found = (json.loads((output(run, "reward-model") / "config.json").read_text()) for run in (one, two))
    for name in ("reward_mean", "reward_std"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3)
    expected, found = (
        json.loads(next((run / "artifacts").glob("*/evaluation/evaluation/evaluation.json")).read_text())
        for run in (one, two)
    )
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_summary_names_the_engine_of_each_stage(one: Path, two: Path) -> None:
    for run, name in ((one, f"torch {torch.__version__}"), (two, "deepspeed 0.19")):
        stages = json.loads((run / "summary.json").read_text())["stages"]
        for stage in STAGES:
            assert stages[stage]["engines"]["training"].startswith(name)
        assert stages["ppo"]["engines"]["rollout"].startswith("transformers ")
    assert stages["sft"]["engines"]["training"].endswith("ZeRO-3, 2 processes")
