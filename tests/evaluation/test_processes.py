"""The evaluation and the calibration in two processes, with whole and with sharded weights, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.evaluation.compare import compare
from components.evaluation.ranks import Ranks
from components.rlhf.config.model import TrainingConfig
from components.rlhf.text.progress import Progress
from tests.support.evaluation_cases import (
    PROMPTS,
    compare_in_passes,
    config_of,
    make_models,
    measure_reward_model,
    numbers_of,
)

pytestmark = pytest.mark.deepspeed
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "models"
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """The folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.support.evaluation_cases", str(folder), str(models)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def results_of(two: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((two / "results.json").read_text())
    return results


@pytest.mark.parametrize("weights", ["whole", "sharded"])
def test_comparison_does_not_depend_on_the_number_of_processes(two: Path, models: Path, weights: str) -> None:
    one, found = compare_in_passes(models, Ranks.of(config_of())), results_of(two)[weights]
    assert found.keys() == one.keys()
    for name, expected in one.items():
        if name.endswith(("ids", "cut", "groups", "wins")):
            assert found[name] == expected, name
        else:  # normalized rewards are in the hundreds
            assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-4), name
    assert len(one["kl"]) == 2 * len(PROMPTS)
    assert min(one["exact_kl"]) > 0.01


@pytest.mark.parametrize("weights", ["whole", "sharded"])
def test_calibration_and_accuracy_do_not_depend_on_the_number_of_processes(
    two: Path, models: Path, tmp_path: Path, weights: str
) -> None:
    one = measure_reward_model(models, tmp_path / "one", TrainingConfig(microbatch_tokens=64))
    assert results_of(two)[f"{weights} reward model"] == pytest.approx(one, rel=1e-5)
    assert one["num_calibration_samples"] == 5
    expected, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", two / weights))
    assert expected.keys() == saved.keys()
    assert all(torch.equal(expected[name], saved[name]) for name in expected)


def test_a_process_without_a_row_changes_nothing(two: Path, models: Path) -> None:
    config = config_of()
    one_row = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_samples": 1})})
    comparison = compare(one_row, PROMPTS[:1], **make_models(models), progress=Progress("evaluation"))
    expected, found = numbers_of(comparison), results_of(two)["one row"]
    assert found["ppo_ids"] == expected["ppo_ids"] and len(found["kl"]) == 1
    assert found["kl"] == pytest.approx(expected["kl"], abs=1e-5)
    assert found["ppo_rewards"] == pytest.approx(expected["ppo_rewards"], rel=1e-5)
    assert results_of(two)["one row, its SFT response given"] == found  # as for a second policy


def test_sharded_weights_are_a_share_and_free_after_the_release(two: Path) -> None:
    """DeepSpeed keeps references to every module, so that only its weights can be freed; others are free with their last reference."""
    (whole, _), (sharded, left) = (results_of(two)[f"{name} bytes"] for name in ("whole", "sharded"))
    assert left == 0
    assert 0.5 * whole <= sharded < 0.75 * whole  # small weights are whole on every rank
