"""notify: what it deletes, what it says and to whom, and that it says it once."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from components.notify.__main__ import main
from components.notify.result import RunResult
from components.notify.webhook import as_message
from components.rlhf.checkpoints.run import mark_run, run_prefix
from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.storage.s3 import S3Store
from components.rlhf.tracking.mlflow import start_tracking
from components.rlhf.tracking.registry import register_version
from components.rlhf.tracking.texts import database_uri
from tests.support.limited_s3 import LimitedS3
from tests.support.mlflow_database import new_database
from tests.support.webhooks import webhook_server

SUCCEEDED = {"state": "SUCCEEDED", "pipelineJobResourceName": "job-1"}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=database_uri(new_database(tmp_path_factory.mktemp("mlflow"))))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LimitedS3]:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    with LimitedS3() as server:
        yield server


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The messages that arrive at the webhook."""
    with webhook_server() as (address, messages):
        monkeypatch.setenv("RLHF_WEBHOOK_URL", f"{address}/hook")
        yield messages


def notify(
    run_id: str, status: dict[str, Any], tracking: TrackingConfig | None = None, storage: StorageConfig | None = None
) -> Result:
    settings = {"preset": "tiny", "ui_url": "https://kfp.example.com/", "params": "seed: 1\n"}
    arguments = ["--status", json.dumps(status), "--settings", json.dumps(settings)]
    arguments += ["--tracking", (tracking or TrackingConfig(enabled=False)).canonical_json()]
    arguments += ["--storage", (storage or StorageConfig()).canonical_json()]
    os.environ["RLHF_RUN_ID"] = run_id
    try:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    finally:
        del os.environ["RLHF_RUN_ID"]
    assert result.exit_code == 0, result.output
    return result


def storage_of(server: LimitedS3) -> StorageConfig:
    return StorageConfig(
        checkpoint_uri="s3://bucket/rlhf/checkpoints",
        publish_uri="s3://bucket/rlhf/models",
        endpoint_url=server.url,
        retry_minutes=0.01,
    )


def filled(server: LimitedS3, run_id: str) -> StorageConfig:
    """Storage with checkpoints of this run and others, and with published models."""
    storage = storage_of(server)
    checkpoints = S3Store("s3://bucket/rlhf/checkpoints", storage)
    mark_run(checkpoints, run_id)
    for key in (
        f"run-{run_id}/ppo/digest/lease.json",
        "run-other/ppo/digest/step",
        f"run-{run_id}0/a",
        f"{run_id}/mine",
    ):
        checkpoints.write(key, b"x")
    S3Store("s3://bucket/rlhf/models", storage).write(f"{run_id}/ppo/model/manifest.json", b"x")
    return storage


def test_only_the_checkpoints_of_a_successful_run_are_deleted(server: LimitedS3) -> None:
    storage = filled(server, "r1")
    before = set(server.objects)
    for status in ({"state": "FAILED"}, {"state": "CANCELED"}, {}):
        notify("r1", status, storage=storage)
        assert set(server.objects) == before
    notify("r1", SUCCEEDED, storage=storage)
    assert before - set(server.objects) == {
        "rlhf/checkpoints/run-r1/checkpoints-of-run.json", "rlhf/checkpoints/run-r1/ppo/digest/lease.json",
    }  # fmt: skip


@pytest.mark.parametrize("marker", [None, b"", b"not json", b'{"run_id": "r2"}', b"[]"])
def test_nothing_is_deleted_without_the_marker_of_this_run(server: LimitedS3, marker: bytes | None) -> None:
    storage = filled(server, "r1")
    server.objects.pop("rlhf/checkpoints/run-r1/checkpoints-of-run.json")
    if marker is not None:
        server.objects["rlhf/checkpoints/run-r1/checkpoints-of-run.json"] = (marker, {})
    before = set(server.objects)
    notify("r1", SUCCEEDED, storage=storage)
    assert set(server.objects) == before


@pytest.mark.parametrize("run_id", ["", "..", ".", "a/b", "../models"])
def test_run_id_that_leads_elsewhere_deletes_nothing(server: LimitedS3, run_id: str) -> None:
    storage = filled(server, "r1")
    before = set(server.objects)
    notify(run_id, SUCCEEDED, storage=storage)
    assert set(server.objects) == before


def test_checkpoints_on_a_volume_are_left_to_the_stages(tmp_path: Path) -> None:
    (tmp_path / run_prefix("r1")).mkdir()
    notify("r1", SUCCEEDED, storage=StorageConfig(checkpoint_uri=str(tmp_path)))
    assert (tmp_path / run_prefix("r1")).is_dir()


def test_failed_run_is_announced_with_its_error_once(tracking: TrackingConfig, webhook: list[dict[str, Any]]) -> None:
    start_tracking(tracking, run_id="r3", stage="sft", params={}).finish("FAILED", "data.prompts: line 3 is broken.")
    result = notify("r3", {"state": "FAILED"}, tracking)
    text = "RLHF run tiny (r3) failed in sft: data.prompts: line 3 is broken. https://kfp.example.com/#/runs/details/r3"
    assert result.stdout == f"[notify] {text}\n"
    (message,) = webhook
    assert (message["text"], message["failed_stage"], message["status"]) == (text, "sft", "failed")
    again = notify("r3", {"state": "FAILED"}, tracking)
    assert "announced by an earlier attempt" in again.stdout and len(webhook) == 1
    start_tracking(tracking, run_id="r3", stage="sft", params={}).finish("FINISHED")
    notify("r3", SUCCEEDED, tracking)  # the run was retried
    assert [m["status"] for m in webhook] == ["failed", "succeeded"] and webhook[1]["failed_stage"] == ""


@pytest.mark.parametrize(("method", "by"), [("ppo", " (PPO)"), ("dpo", " (DPO)"), ("", "")])
def test_message_names_the_method_of_the_registered_policy(
    tracking: TrackingConfig, webhook: list[dict[str, Any]], tmp_path: Path, method: str, by: str
) -> None:
    (tmp_path / "MLmodel").write_text("{}", encoding="utf-8")
    run_id = f"by-{method or 'an earlier version'}"
    start_tracking(tracking, run_id=run_id, stage="register", params={}).finish("FINISHED")
    lineage = {"method": method} if method else {}
    register_version(
        tracking, folder=tmp_path, run_id=run_id, decision="promote", reason="win rate 0.7", lineage=lineage
    )
    notify(run_id, SUCCEEDED, tracking)
    (message,) = webhook
    assert f"succeeded: promoted{by}, win rate 0.7." in message["text"] and message["method"] == method


def test_parent_run_gets_metrics_and_files(tracking: TrackingConfig) -> None:
    tracker = start_tracking(tracking, run_id="r4", stage="evaluation", params={})
    tracker.log({"final/win_rate": 0.75}, 0)
    tracker.finish("FINISHED")
    notify("r4", SUCCEEDED, tracking)
    client = MlflowClient(tracking_uri=tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    assert experiment
    (parent,) = client.search_runs([experiment.experiment_id], filter_string="tags.`rlhf.run_id` = 'r4'")
    assert (
        parent.data.metrics["win_rate"] == 0.75
        and parent.data.metrics["cost/hours"] > 0
        and parent.info.status == "FINISHED"
    )
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == {"params.yaml", "summary.json"}


def test_unreachable_services_are_warnings(webhook: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    storage = StorageConfig(checkpoint_uri="s3://bucket/c", endpoint_url="http://127.0.0.1:9", retry_minutes=0.01)
    monkeypatch.setenv("RLHF_WEBHOOK_URL", "http://127.0.0.1:9/hook")
    result = notify("r5", SUCCEEDED, TrackingConfig(uri="http://127.0.0.1:9"), storage)
    assert "the checkpoints of this run could not be deleted" in result.stderr
    assert "the message could not be posted to the webhook" in result.stderr


@pytest.mark.parametrize("text", ["<!channel>", "<@U123>", "<https://evil.example|here>", "a < b"])
def test_message_mentions_nobody_and_hides_no_link(text: str) -> None:
    result = RunResult("failed", "a/b?c#d", failed_stage="sft", error=text)
    message = as_message(NotifyStageConfig(preset="x", ui_url="https://kfp.example.com/"), result)
    assert not re.search(r"<[!@#a-z]", message["text"]) and message["error"] == text
    assert message["link"] == "https://kfp.example.com/#/runs/details/a%2Fb%3Fc%23d"
