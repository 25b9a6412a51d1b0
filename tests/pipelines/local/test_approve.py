"""`kfp-rlhf approve`, what gate.approval changes in the pipeline, and whole runs that wait for a person."""

import json
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.errors import InputError
from components.rlhf.tracking.approvals import Answer, approve_version, request_approval, tags_of_run
from components.rlhf.tracking.registry import register_version
from components.rlhf.tracking.texts import database_uri
from pipelines.__main__ import cli
from pipelines.local.summary import build_summary
from pipelines.settings import evaluation_settings, load_params
from tests.pipelines.local.test_summary import write_evaluation, write_policy
from tests.pipelines.local.test_whole_run import summary_of
from tests.rlhf.config.test_settings import minimal_params
from tests.support.compiled_pipelines import CompiledPipeline
from tests.support.mlflow_database import new_database
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

ROOT = Path(__file__).resolve().parents[3]
REQUIRED = "gate.approval=required"
PENDING = {"approval": "pending", "digest": "d", "approval_requested_at": "2026-01-01T00:00:00+00:00"}


def approve(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(cli, ["approve", *map(str, arguments)], env={"MLFLOW_TRACKING_URI": None, **environment})


def refusal(*arguments: object) -> str:
    result = approve(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    return folder


BY_ANN = ("--by", "Ann", "--why", "read them")


@pytest.mark.parametrize(("flags", "state"), [((), "approved"), (("--reject",), "rejected")])
def test_answer_is_written_into_the_run_directory_once(run: Path, flags: tuple[str, ...], state: str) -> None:
    (run / "approval.json").write_text(json.dumps(PENDING))
    result = approve(run, *BY_ANN, *flags)
    assert result.exit_code == 0 and f"{state} by Ann: read them" in result.output
    assert f"kfp-rlhf run --resume {run}" in result.output  # nothing runs
    found = json.loads((run / "approval.json").read_text())
    expected = PENDING | {"approval": state, "approved_by": "Ann", "approval_reason": "read them"}
    assert found.items() >= expected.items() and found["approved_at"] > "2026"
    assert f"was {state} by Ann at" in refusal(run, "--by", "Bob", "--why", "x")
    assert json.loads((run / "approval.json").read_text()) == found


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path) -> None:
    assert "does not wait for approval" in refusal(run, *BY_ANN)
    (run / "approval.json").write_text(json.dumps(PENDING))
    assert "--by must be a text" in refusal(run, "--by", " ", "--why", "x")
    assert "--why must be a text" in refusal(run, "--by", "Ann", "--why", "a\nb")
    assert "contains no run" in refusal(tmp_path, *BY_ANN)
    assert "also pass the address of its MLflow server" in refusal("5f0c6f0e", *BY_ANN)
    assert json.loads((run / "approval.json").read_text()) == PENDING


def test_run_on_a_cluster_is_answered_in_mlflow(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "MLmodel").write_text("{}")
    tracking = TrackingConfig(uri=database_uri(new_database(tmp_path)), registered_model="mine")
    version = register_version(tracking, folder=model, run_id="5f0c", decision="", reason="", lineage={"digest": "d"})
    request_approval(tracking, version, time.time())
    assert "has no version of kfp-rlhf" in refusal("5f0c", *BY_ANN, "--mlflow", tracking.uri)
    result = approve("5f0c", *BY_ANN, "--model", "mine", MLFLOW_TRACKING_URI=str(tracking.uri))
    assert result.output == "version 1 of mine is approved by Ann: read them\n"
    tags = tags_of_run(tracking, "5f0c")
    assert (tags["approval"], tags["approved_by"], tags["approval_reason"]) == ("approved", "Ann", "read them")


# --- params and pipeline ---


def test_evaluation_does_not_depend_on_approval() -> None:
    """So that its results are reused and shared, whoever must approve."""
    plain, required = (load_params(ROOT / "pipelines/params/tiny.yaml", list(o)) for o in ((), (REQUIRED,)))
    assert evaluation_settings(plain, "ppo") == evaluation_settings(required, "ppo")
    assert "approval" not in evaluation_settings(required, "ppo")
    EvaluationStageConfig.from_json(evaluation_settings(required, "ppo"))


@pytest.mark.parametrize("override", ["gate.approval=yes", "gate.approval_hours=0", "gate.approval_hours=9000"])
def test_meaningless_settings_are_refused(override: str) -> None:
    with pytest.raises(InputError, match="gate.approval"):
        load_params(ROOT / "pipelines/params/tiny.yaml", [override])


def settings_in(compiled: CompiledPipeline) -> list[dict[str, Any]]:
    values = [
        json.loads(task["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"])
        for name, task in compiled.tasks.items()
        if name.startswith("register")
    ]
    return sorted(values, key=lambda each: str(each["decision"]))


def test_only_the_branch_that_promotes_waits_and_no_task_is_added(tmp_path: Path) -> None:
    path = ROOT / "pipelines/params/tiny.yaml"
    secrets = ["cluster.secrets.webhook=hook", "cluster.timeout_hours=2", "cluster.ui_url=http://kfp"]
    plain = CompiledPipeline(load_params(path, secrets), tmp_path / "plain")
    asking = CompiledPipeline(load_params(path, [*secrets, REQUIRED, "gate.approval_hours=10"]), tmp_path / "asking")
    assert set(plain.tasks) == set(asking.tasks)
    assert settings_in(plain) == [{"approval": None, "decision": branch} for branch in ("promote", "reject")]
    promote, reject = settings_in(asking)
    assert promote["approval"] == {"hours": 10.0, "preset": "tiny", "ui_url": "http://kfp"}
    assert reject["approval"] is None
    for compiled, hours, has_webhook in ((plain, 2, False), (asking, 12, True)):
        assert int(compiled.pods["register"]["activeDeadlineSeconds"]) == 3600 * hours
        assert int(compiled.pods["notify"]["activeDeadlineSeconds"]) == 3600 * 2
        assert ("hook?" in compiled.secrets("register")) == has_webhook


@pytest.mark.parametrize(("state", "promoted"), [("approved", True), ("rejected", False)])
def test_summary_says_what_the_person_said(tmp_path: Path, state: str, *, promoted: bool) -> None:
    write_policy(tmp_path, "ppo")
    write_evaluation(tmp_path / "artifacts/rlhf/evaluation/evaluation", "ppo", win_rate=0.7, decision="promote")
    tags = PENDING | {"approval": state, "approved_by": "Ann", "approval_reason": "read"}
    (tmp_path / "approval.json").write_text(json.dumps(tags))

    def summary(**gate: Any) -> dict[str, Any]:
        params = Params.model_validate(minimal_params() | {"gate": gate})
        return build_summary(params, tmp_path, [], run_id="r", error="", tracking_uri="")

    found = summary(approval="required")
    assert (found["promoted"], found["reason"]) == (promoted, f"ppo has 0.7; {state} by Ann: read")
    assert found["approval"]["approved_by"] == "Ann"
    assert summary()["promoted"] is True and "approval" not in summary()


# --- whole runs ---


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, resident: Resident) -> Path:
    """The directory of a run that was interrupted while it waited for a person."""
    folder = tmp_path_factory.mktemp("waiting")
    gate = {"approval": "required", "approval_hours": 1.0}
    params = write_params(folder / "toy.yaml", toy_params(tiny_model, write_data(folder), gate=gate))
    run = folder / "run"
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(run)]
    with (folder / "terminal").open("w") as log:
        process = resident.popen(command, stdout=log, stderr=log)
        while not (run / "approval.json").is_file() or tags_in(run).get("approval") != "pending":
            assert process.poll() is None, (folder / "terminal").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    return run


def tags_in(run: Path) -> dict[str, str]:
    """Tags of the only version in the database of a run."""
    try:
        with sqlite3.connect(run / "mlflow.db") as database:
            rows = database.execute("select key, value from model_version_tags").fetchall()
    except sqlite3.OperationalError:
        return {}
    return dict(rows)


def aliases_in(run: Path) -> set[str]:
    with sqlite3.connect(run / "mlflow.db") as database:
        return {alias for (alias,) in database.execute("select alias from registered_model_aliases")}


@pytest.mark.slow
def test_run_that_is_approved_while_it_is_interrupted_goes_on_and_promotes(
    waiting: Path, tmp_path: Path, resident: Resident
) -> None:
    run = Path(shutil.copytree(waiting, tmp_path / "run", symlinks=True))
    assert "waits for approval until" in (run / "logs/register.log").read_text()
    assert aliases_in(run) == {"candidate"} and "decision" not in tags_in(run)
    assert summary_of(run)["status"] == "failed" and summary_of(run)["promoted"] is False
    result = approve(run, *BY_ANN)
    assert result.exit_code == 0, result.output

    done = resident.run([sys.executable, "-m", "pipelines", "run", "--resume", str(run)], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Promoted" in done.stdout and "approved by Ann: read them" in " ".join(done.stdout.split())
    assert aliases_in(run) == {"candidate", "champion"}
    tags = tags_in(run)
    assert (tags["decision"], tags["approval"], tags["approved_by"]) == ("promote", "approved", "Ann")
    assert tags["reason"].endswith("; approved by Ann: read them") and tags["approved_at"]
    summary = summary_of(run)
    assert summary["promoted"] is True and summary["approval"]["approval_reason"] == "read them"
    assert summary["stages"]["evaluation"]["reused"] and not summary["stages"]["register"]["reused"]


@pytest.mark.slow
def test_run_that_is_rejected_in_mlflow_while_it_waits_ends_well(
    waiting: Path, tmp_path: Path, resident: Resident
) -> None:
    run = Path(shutil.copytree(waiting, tmp_path / "run", symlinks=True))
    tracking = TrackingConfig(uri=database_uri(run / "mlflow.db"))
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    lines = (run / "logs/register.log").read_text().count("waits for approval until")
    with (tmp_path / "terminal").open("w") as log:
        process = resident.popen(
            [sys.executable, "-m", "pipelines", "run", "--resume", str(run)], stdout=log, stderr=log
        )
        while not (run / "finished/register.begun").stat().st_mtime > (waiting / "approval.json").stat().st_mtime:
            assert process.poll() is None, (tmp_path / "terminal").read_text()
            time.sleep(0.1)
        answer = Answer(approved=False, by="Bob", why="too terse", at="2026-01-01T00:00:00+00:00")
        approve_version(tracking, run_id, answer)
        assert process.wait(120) == 0, (tmp_path / "terminal").read_text()
    assert aliases_in(run) == {"candidate"}
    assert answer.tags().items() <= tags_in(run).items() and tags_in(run)["decision"] == "reject"
    assert json.loads((run / "approval.json").read_text())["approved_by"] == "Bob"
    assert summary_of(run)["promoted"] is False and "rejected by Bob: too terse" in summary_of(run)["reason"]
    assert (run / "logs/register.log").read_text().count("waits for approval until") == lines  # it was asked once
