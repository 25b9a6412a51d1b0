"""Both presets of the default task on the real model and the real ratings, with few steps per stage and little data."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.resident import Resident

pytestmark = pytest.mark.slow
FEW = (
    "data.held_out=0.06", "data.num_validation_prompts=16", "sft.max_steps=3", "reward_model.max_steps=3",
    "reward_model.num_calibration_samples=32", "ppo.num_iterations=2", "ppo.rollout.num_prompts=32", "ppo.minibatch=16",
    "evaluation.num_prompts=64",
)  # fmt: skip


def command_of(out: Path, *settings: str) -> list[str]:
    options = [part for setting in (*settings, *FEW) for part in ("--set", setting)]
    return [sys.executable, "-m", "pipelines", "run", "--out", str(out), *options]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("quick") / "run"
    result = subprocess.run(command_of(run, "preset=quick"), capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    return run


@pytest.fixture(scope="module")
def full(quick: Path, resident: Resident, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset full starts from the weights that the run of quick has dequantized."""
    (imported,) = (quick / "artifacts").glob("*/import-model/model")
    run = tmp_path_factory.mktemp("full") / "run"
    result = resident.run(command_of(run, "preset=full", f"model.source={imported}"), timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    return run


@pytest.mark.parametrize(("preset", "lengths"), [("quick", (16, 16)), ("full", (4, 32))])
def test_both_presets_run_on_the_real_model(
    preset: str, lengths: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(preset)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "succeeded"
    assert summary["preset"] == preset
    numbers = summary["evaluation"]
    assert numbers["num_prompts"] == 64
    assert all(math.isfinite(value) for value in summary["evaluation_all"].values())
    assert summary["evaluation_all"]["judge_accuracy"] > 0.6
    (samples,) = (run / "artifacts").glob("*/evaluation/evaluation/samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    found = [row[side]["num_tokens"] for row in rows for side in ("sft", "ppo")]
    assert lengths[0] <= min(found) <= max(found) <= lengths[1]
    assert (min(found) < max(found)) == (preset == "full")  # in quick, length cannot affect the win rate
    assert max(stage["peak_memory_bytes"] for stage in summary["stages"].values()) < 8 * 2**30
    model = AutoModelForCausalLM.from_pretrained(summary["paths"]["model"])
    assert model.config.num_hidden_layers == 30
    (history,) = (run / "artifacts").glob("*/ppo/model/history.jsonl")
    first = json.loads(history.read_text().splitlines()[0])
    assert first["actor/first_ratio_error"] == 0.0
