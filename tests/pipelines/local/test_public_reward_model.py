"""`kfp-rlhf run` with a reward model from elsewhere: imported, measured, and read as text by PPO and evaluation."""

import json
import sys
from pathlib import Path

import pytest

from components.rlhf.artifacts.directory import open_artifact
from tests.support.public_reward_models import make_public_reward_model
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params


@pytest.mark.slow
def test_run_with_a_public_reward_model(tiny_model: Path, tmp_path: Path, resident: Resident) -> None:
    public = make_public_reward_model(tmp_path / "public")
    reward_model = {"use": str(public), "num_calibration_samples": 16}
    content = toy_params(tiny_model, write_data(tmp_path), reward_model=reward_model)
    content["data"]["template"] = "chat"
    params = write_params(tmp_path / "toy.yaml", content)
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(tmp_path / "run")]
    result = resident.run(command, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    logs = "".join(path.read_text() for path in (tmp_path / "run/logs").glob("*.log"))
    assert "the reward model reads text, with its own tokenizer" in logs
    (folder,) = (tmp_path / "run/artifacts").glob("*/reward-model/model")
    manifest = open_artifact(folder, "reward_model")
    assert manifest.facts["scored_as"] == "text"
    assert manifest.tokenizer_digest == ""
    assert manifest.facts["reward_std"] > 1
    assert 0 <= manifest.facts["heldout_accuracy"] <= 1
    assert set(manifest.parents) == {"imported", "sft_model", "preferences", "prompts"}
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "succeeded"
