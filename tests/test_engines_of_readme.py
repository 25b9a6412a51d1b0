"""The engine commands of the README on the real model."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.resident import Resident


@pytest.mark.slow
def test_vllm_and_deepspeed_run_the_tiny_params_on_the_real_model(tmp_path: Path, resident: Resident) -> None:
    """Both commands of the README in one run: rollouts with vLLM, and PPO training with DeepSpeed in two processes."""
    engines = ("ppo.rollout.engine=vllm", "ppo.training.engine=deepspeed", "ppo.training.num_processes=2")
    settings = [part for setting in engines for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", "run", "pipelines/params/tiny.yaml", "--out", str(tmp_path / "run")]
    result = resident.run([*command, *settings], timeout=1500)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]["ppo"]["engines"]
    assert found["rollout"].startswith("vllm 0.32")
    assert found["training"] == f"deepspeed {version('deepspeed')}, ZeRO-2, 2 processes"
    (history,) = (tmp_path / "run" / "artifacts").glob("*/ppo/model/history.jsonl")
    for row in map(json.loads, history.read_text().splitlines()):
        assert row["engine_gap/mean"] < 0.2  # nats per token; the engines round bf16 differently
        assert abs(row["kl/sequence"]) < 2
