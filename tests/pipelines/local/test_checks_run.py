"""A whole run with PPO and DPO and checks of the gate: the policy of PPO fails one of them, that of DPO passes all."""

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.artifacts.directory import open_artifact
from tests.pipelines.local.test_whole_run import output, summary_of
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

pytestmark = pytest.mark.slow
STEADY = {"schedule": "constant", "warmup_fraction": 0.0}
LIMIT = 0.05  # nats per token


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, resident: Resident) -> Path:
    """PPO takes steps so large that nobody can say what its policy has forgotten; DPO hardly moves."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "set.txt").write_text("".join(f"Tell me secret number {number}\n" for number in range(10)))
    checks: list[dict[str, Any]] = [
        {"kind": "perplexity", "name": "forgetting", "max_increase": LIMIT},
        {"kind": "prompts", "name": "anything", "prompts_file": "set.txt", "pattern": "(?s).", "max_decrease": 1.0},
    ]
    params = toy_params(
        tiny_model,
        write_data(folder),
        policy={"method": "both"},
        dpo={"num_epochs": 1, "batch_size": 8, "training": STEADY | {"learning_rate": 1e-5}},
        gate={"max_kl": 1e6, "min_win_rate": 0.0, "checks": checks},
    )
    params["ppo"] |= {"eval_every": 0, "training": STEADY | {"learning_rate": 0.05}}
    command = [sys.executable, "-m", "pipelines", "run", str(write_params(folder / "params.yaml", params))]
    result = resident.run([*command, "--out", str(folder / "run")], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "terminal").write_text(result.stdout)
    return folder / "run"


def test_gate_rejects_the_policy_that_fails_a_check_and_says_which(run: Path) -> None:
    policies = summary_of(run)["policies"]
    assert {name: policy["decision"] for name, policy in policies.items()} == {"ppo": "reject", "dpo": "promote"}
    assert policies["ppo"]["reason"].startswith("check forgetting: increase of ")
    assert policies["ppo"]["reason"].endswith(f"nats per token breaks max_increase {LIMIT:g}")
    assert policies["dpo"]["reason"].endswith(", and it passes the checks forgetting, anything")
    assert (
        "PPO does not go to the gate, which would reject it: check forgetting" in (run.parent / "terminal").read_text()
    )


def test_rows_are_in_the_summary_the_artifacts_and_the_report(run: Path) -> None:
    rows = {method: json.loads((output(run, task, "checks") / "checks.json").read_text()) for method, task in
            (("ppo", "checks"), ("dpo", "checks-2"))}  # fmt: skip
    assert summary_of(run)["checks"] == rows["dpo"]
    for method, own in rows.items():
        assert [(row["check"], row["bound"]) for row in own] == [
            ("forgetting", "max_increase"),
            ("anything", "max_decrease"),
        ]
        forgetting = own[0]
        assert forgetting["value"] == pytest.approx(forgetting["policy"] - forgetting["sft"], abs=1e-9)
        assert forgetting["passed"] == (forgetting["high"] <= LIMIT) == (method == "dpo")
    assert rows["ppo"][0]["sft"] == rows["dpo"][0]["sft"]
    page = output(run, "evaluation", "summary").read_text()
    assert page.startswith("# Reject\n\ncheck forgetting: increase of ") and "| failed |" in page
    assert "check forgetting: increase of" in output(run, "evaluation", "report").read_text()
    assert "| passed |" in output(run, "evaluation-2", "summary").read_text()


def test_checks_are_parents_of_the_evaluation_and_their_numbers_are_in_mlflow(run: Path) -> None:
    checks = open_artifact(output(run, "checks-2", "checks"), "checks")
    assert open_artifact(output(run, "evaluation-2", "evaluation"), "evaluation").parents["checks"] == checks.digest
    with sqlite3.connect(run / "mlflow.db") as database:
        names = {row[0] for row in database.execute("select key from metrics").fetchall()}
        (reason,) = database.execute("select value from model_version_tags where key = 'reason'").fetchone()
    assert {"final/forgetting/max_increase_high", "checks/forgetting/max_increase_passed"} <= names
    assert "passes the checks forgetting, anything" in reason
