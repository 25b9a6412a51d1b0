"""Both presets of the default task on the real model and the real ratings, with few steps a stage."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
FEW = (
    "sft.max_steps=4", "reward_model.max_steps=4", "reward_model.num_calibration_samples=32", "ppo.num_iterations=2",
    "evaluation.num_prompts=64",
)  # fmt: skip


@pytest.mark.parametrize(("preset", "lengths"), [("quick", (16, 16)), ("full", (4, 32))])
def test_both_presets_run_on_the_real_model(preset: str, lengths: tuple[int, int], tmp_path: Path) -> None:
    settings = [part for setting in (f"preset={preset}", *FEW) for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", "run", "--out", str(tmp_path / "run"), *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "succeeded"
    assert summary["preset"] == preset
    numbers = summary["evaluation"]
    assert numbers["num_prompts"] == 64
    assert all(math.isfinite(value) for value in summary["evaluation_all"].values())
    assert summary["evaluation_all"]["judge_accuracy"] > 0.6
    (samples,) = (tmp_path / "run" / "artifacts").glob("*/evaluation/evaluation/samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    found = [row[side]["num_tokens"] for row in rows for side in ("sft", "ppo")]
    assert lengths[0] <= min(found) <= max(found) <= lengths[1]
    assert (min(found) < max(found)) == (preset == "full")  # in quick no answer can win by its length
    assert max(stage["peak_memory_bytes"] for stage in summary["stages"].values()) < 8 * 2**30
    model = AutoModelForCausalLM.from_pretrained(summary["paths"]["model"])
    assert model.config.num_hidden_layers == 30
    (history,) = (tmp_path / "run" / "artifacts").glob("*/ppo/model/history.jsonl")
    first = json.loads(history.read_text().splitlines()[0])
    assert first["actor/first_ratio_error"] == 0.0
