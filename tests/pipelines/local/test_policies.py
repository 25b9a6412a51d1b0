"""`kfp-rlhf run` with DPO, and with PPO and DPO side by side, killed in the middle of DPO."""

import json
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from components.rlhf.artifacts.directory import open_artifact
from tests.pipelines.local.test_resume import resume_in_resident, wait_for_file
from tests.pipelines.local.test_whole_run import STAGES, output, summary_of
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

pytestmark = pytest.mark.slow
SLOW = {"learning_rate": 3e-4, "schedule": "constant", "warmup_fraction": 0.0}
DPO_STAGES = sorted({*STAGES, "dpo"} - {"reward_model", "ppo"})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """A params file for each method. PPO takes steps so large that the gate rejects its policy for its KL."""
    folder, found = tmp_path_factory.mktemp("policies"), {}
    data = write_data(folder)
    for method in ("dpo", "both"):
        params = toy_params(
            tiny_model,
            data,
            policy={"method": method},
            dpo={"num_epochs": 6, "batch_size": 8, "training": SLOW},
            gate={"max_kl": 3.0},
            checkpoint={"every_minutes": 0},
        )
        params["ppo"] |= {"eval_every": 0, "training": SLOW | {"learning_rate": 0.05}}
        found[method] = write_params(folder / f"{method}.yaml", params)
    return found


@pytest.fixture(scope="module")
def dpo(files: dict[str, Path], resident: Resident, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run with DPO alone, uninterrupted."""
    run = tmp_path_factory.mktemp("dpo") / "run"
    command = [sys.executable, "-m", "pipelines", "run", str(files["dpo"]), "--out", str(run)]
    result = resident.run(command, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (run.parent / "terminal").write_text(result.stdout)
    return run


def versions_of(run: Path) -> list[dict[str, str]]:
    """The tags of all registered versions."""
    with sqlite3.connect(run / "mlflow.db") as database:
        rows = database.execute("select version, key, value from model_version_tags").fetchall()
    return [{k: v for other, k, v in rows if other == version} for version in sorted({row[0] for row in rows})]


def metrics_of_the_run(run: Path) -> dict[str, float]:
    with sqlite3.connect(run / "mlflow.db") as database:
        rows = database.execute(
            "select m.key, m.value from metrics m join tags t using (run_uuid) where t.key = 'rlhf.run_id' and t.value = ? "
            "and run_uuid not in (select run_uuid from tags where key = 'mlflow.parentRunId')",
            (summary_of(run)["run_id"],),
        ).fetchall()
    return dict(rows)


def test_run_with_dpo_alone(dpo: Path) -> None:
    summary = summary_of(dpo)
    assert sorted(summary["stages"]) == DPO_STAGES
    assert (summary["status"], summary["promoted"], summary["method"]) == ("succeeded", True, "dpo")
    assert set(summary["policies"]) == {"dpo"} and summary["policies"]["dpo"]["decision"] == "promote"
    assert {"length_dpo", "distinct2_dpo", "kl"} < set(summary["evaluation"])
    assert not any("ppo" in name or "reward" in name for name in summary["evaluation"])
    assert summary["stages"]["dpo"]["engines"] == {"training": summary["stages"]["sft"]["engines"]["training"]}
    assert summary["stages"]["dpo"]["memory"]["planned_gib"] > 0
    policy = open_artifact(output(dpo, "dpo", "model"), "policy_model")
    sft = open_artifact(output(dpo, "sft", "model"), "sft_model")
    verdict = open_artifact(output(dpo, "evaluation", "evaluation"), "evaluation")
    assert policy.parents["sft_model"] == sft.digest and verdict.parents["policy_model"] == policy.digest
    assert (dpo / "model").resolve() == output(dpo, "dpo", "model").resolve()
    page = (dpo / "report.html").read_text()
    assert "DPO vs. the fine-tuned model" in page and "PPO" not in page
    assert (dpo / "dpo_curves.html").is_file() and not (dpo / "ppo_curves.html").exists()
    assert "DPO against SFT on 8 held-out prompts" in (dpo.parent / "terminal").read_text()
    (tags,) = versions_of(dpo)
    assert (tags["method"], tags["decision"], tags["digest"]) == ("dpo", "promote", policy.digest)
    assert metrics_of_the_run(dpo)["kl"] == summary["evaluation"]["kl"]


def test_both_killed_in_dpo_and_resumed_ends_with_the_same_policy_and_registers_the_better_one(
    files: dict[str, Path], dpo: Path, resident: Resident, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipelines", "run", str(files["both"]), "--out", str(run)]
    with (tmp_path / "first").open("w") as log:
        first = resident.popen(command, stdout=log, stderr=log)
        wait_for_file(first, run, "checkpoints/run-*/dpo/*/step-*[1-9]*/.complete")
        first.kill()
    assert first.wait(timeout=30) == -signal.SIGKILL
    result = resume_in_resident(resident, run)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[sft] finished earlier, verified" in result.stdout
    assert "resuming after step" in (run / "logs" / "dpo.log").read_text()

    # DPO learned what it learns alone and undisturbed: from the same SFT model, on the same pairs.
    ppo, own, alone = (
        open_artifact(output(folder, stage, "model"), "policy_model")
        for folder, stage in ((run, "ppo"), (run, "dpo"), (dpo, "dpo"))
    )
    assert own.files["model.safetensors"] == alone.files["model.safetensors"] != ppo.files["model.safetensors"]
    assert own.parents["sft_model"] == ppo.parents["sft_model"] == alone.parents["sft_model"]

    summary = summary_of(run)
    stages = [name.partition("-")[0] for name in summary["stages"]]  # register-3 is that of a promoted policy of DPO
    assert sorted(stages) == sorted([*STAGES, "dpo", "evaluation"])
    assert (summary["method"], summary["promoted"]) == ("dpo", True)
    decisions = {name: policy["decision"] for name, policy in summary["policies"].items()}
    assert decisions == {"ppo": "reject", "dpo": "promote"}, summary["policies"]
    assert summary["evaluation"] == summary["policies"]["dpo"]["evaluation"]
    assert summary["evaluation"]["kl"] < 3.0 < summary["policies"]["ppo"]["evaluation"]["kl"]
    assert (run / "model").resolve() == output(run, "dpo", "model").resolve()
    (tags,) = versions_of(run)
    assert (tags["method"], tags["decision"], tags["digest"]) == ("dpo", "promote", own.digest)

    # The responses of the SFT model are those of the first evaluation, which is a parent of the second.
    verdicts = [output(run, stage, "evaluation") for stage in ("evaluation", "evaluation-2")]
    manifests = [open_artifact(folder, "evaluation") for folder in verdicts]
    assert manifests[1].parents["evaluation"] == manifests[0].digest
    rows = [[json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()] for folder in verdicts]
    assert [row["sft"]["response"] for row in rows[0]] == [row["sft"]["response"] for row in rows[1]]
    assert set(rows[0][0]) - set(rows[1][0]) == {"ppo"} and set(rows[1][0]) - set(rows[0][0]) == {"dpo"}
    logs = [(run / "logs" / f"{stage}.log").read_text() for stage in ("evaluation", "evaluation-2")]
    assert ["fine-tuned model responses" in log for log in logs] == [True, False]
    page = (run / "report.html").read_text()
    assert (
        "PPO and DPO side by side" in page
        and "DPO&#39;s policy goes to the gate, because PPO&#39;s is rejected" in page
    )
    assert "PPO does not go to the gate, which would reject it: KL" in result.stdout
    assert (run / "dpo_curves.html").is_file() and (run / "ppo_curves.html").is_file()

    # In MLflow, the metrics of the run are those of the policy that goes to the gate.
    found = metrics_of_the_run(run)
    assert (found["kl"], found["goes_to_gate"]) == (summary["evaluation"]["kl"], 1.0)
    assert found["ppo_evaluation/kl"] == summary["policies"]["ppo"]["evaluation"]["kl"]
