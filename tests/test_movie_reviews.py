"""The default run on the real model and the real ratings, with few steps a stage."""

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
    "evaluation.num_prompts=256",
)  # fmt: skip


def test_the_default_params_run_on_the_real_model(tmp_path: Path) -> None:
    settings = [part for setting in FEW for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", "run", "--out", str(tmp_path / "run"), *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "succeeded"
    numbers = summary["evaluation"]
    assert numbers["num_prompts"] == 256
    assert all(math.isfinite(value) for value in numbers.values())
    assert (numbers["length_sft"], numbers["length_ppo"]) == (
        16,
        16,
    )  # fixed in this preset, so that neither can win by it
    assert max(stage["peak_memory_bytes"] for stage in summary["stages"].values()) < 8 * 2**30
    model = AutoModelForCausalLM.from_pretrained(summary["paths"]["model"])
    assert model.config.num_hidden_layers == 30
    (history,) = (tmp_path / "run" / "artifacts").glob("*/ppo/model/history.jsonl")
    first = json.loads(history.read_text().splitlines()[0])
    assert first["actor/first_ratio_error"] == 0.0
