"""A run on this machine that stops at its budget, and goes on with a higher one."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

pytestmark = pytest.mark.slow


def test_run_stops_at_its_budget_and_resumes_with_a_higher_one(
    resident: Resident, tiny_model: Path, tmp_path: Path
) -> None:
    params = toy_params(tiny_model, write_data(tmp_path), checkpoint={"every_minutes": 60})
    profiles = {"cpu": {"price_per_hour": 0}, "dear": {"price_per_hour": 3600 * 100}}  # PPO costs 100 per second
    params["cluster"] = {"budget": 1000, "stages": {"ppo": "dear"}, "profiles": profiles}
    params["ppo"]["num_iterations"] = 100_000
    run, file = tmp_path / "run", write_params(tmp_path / "toy.yaml", params)

    first = resident.run([sys.executable, "-m", "pipelines", "run", str(file), "--out", str(run)], timeout=600)
    assert first.returncode == 1
    reason = json.loads((run / "summary.json").read_text())["reason"]
    assert reason.startswith("ppo: ") and "cluster.budget is 1000, and this run has spent " in reason
    assert "(reward_model 0.00, sft 0.00, ppo " in reason
    (kept,) = run.glob("checkpoints/run-*/ppo/*/step-*")
    assert str(kept) in reason

    refused = resident.run(
        [sys.executable, "-m", "pipelines", "run", "--resume", str(run), "--set", "seed=1"], timeout=600
    )
    assert "only cluster.budget may change: remove --set seed" in refused.stderr
    spent = float(reason.partition("has spent ")[2].split()[0])
    raised = ["--resume", str(run), "--set", f"cluster.budget={spent + 1000:.0f}"]
    second = resident.run([sys.executable, "-m", "pipelines", "run", *raised], timeout=600)
    for stage in ("import_model", "prepare_data", "sft", "reward_model"):
        assert f"[{stage}] finished earlier, verified" in second.stdout
    assert "[ppo] resuming after iteration" in (run / "logs" / "ppo.log").read_text()
    assert f"cluster.budget is {spent + 1000:.0f}, and this run has spent " in second.stdout
    assert kept < max(run.glob("checkpoints/run-*/ppo/*/step-*"))
