"""The parent run of a pipeline run: what it shows at the end, and the runs of Kubeflow Pipelines' own MLflow plugin."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.config.storage import SETTINGS_VARIABLE, TrackingConfig
from components.rlhf.tracking.mlflow import start_tracking
from components.rlhf.tracking.parent import GOES_TO_GATE, Parent, experiment_link, open_parent
from components.rlhf.tracking.runs import flatten
from components.rlhf.tracking.tables import data_sets_of
from components.rlhf.tracking.texts import database_uri
from pipelines.commands.options import DEFAULT_PARAMS
from pipelines.settings import dump_yaml, load_params, own_settings
from tests.support.mlflow_database import new_database

EXPERIMENT = "parents"


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=database_uri(new_database(tmp_path_factory.mktemp("mlflow"))), experiment=EXPERIMENT)


@pytest.fixture(scope="module")
def client(tracking: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking.uri)


def run_stage(
    tracking: TrackingConfig, run_id: str, stage: str, metrics: dict[str, float], *files: Path, error: str = ""
) -> None:
    tracker = start_tracking(tracking, run_id=run_id, stage=stage, params={"seed": 1})
    tracker.log({"train/loss": 3.0, **{f"final/{name}": value for name, value in metrics.items()}}, step=0)
    for file in files:
        tracker.log_file(file)
    tracker.finish("FAILED" if error else "FINISHED", error)


def opened(tracking: TrackingConfig, run_id: str) -> Parent:
    parent = open_parent(tracking, run_id)
    assert parent
    return parent


def parent_of(client: MlflowClient, run_id: str) -> Any:
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (run,) = client.search_runs([experiment], filter_string=f"tags.`rlhf.run_id` = '{run_id}'")
    return run


def without_cost(run: Any) -> dict[str, float]:
    return {name: value for name, value in run.data.metrics.items() if not name.startswith("cost/")}


def finish(tracking: TrackingConfig, run_id: str, status: str) -> None:
    parent = opened(tracking, run_id)
    facts = {"run_id": run_id, "decision": "", "reason": ""}
    parent.finish(status=status, stages=parent.stages(), facts=facts, params="seed: 1\n")


def test_parent_shows_final_metrics_and_reports_of_its_stages(
    tracking: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    report.write_text("<!doctype html>ö", encoding="utf-8")
    run_stage(tracking, "good", "sft", {"loss": 0.5})
    run_stage(tracking, "good", "evaluation", {"win_rate": 0.75, "kl": 3.0}, report)
    run_stage(tracking, "other", "evaluation", {"win_rate": 0.1})
    finish(tracking, "good", "succeeded")
    parent = parent_of(client, "good")
    assert without_cost(parent) == {"win_rate": 0.75, "kl": 3.0, "sft/loss": 0.5}
    assert parent.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"params.yaml", "summary.json", "report.html"}
    folder = Path(client.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    assert (folder / "report.html").read_text(encoding="utf-8") == report.read_text(encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "succeeded" and summary["evaluation"] == {"win_rate": 0.75, "kl": 3.0}
    assert [(stage["name"], stage["status"]) for stage in summary["stages"]] == [
        ("sft", "FINISHED"),
        ("evaluation", "FINISHED"),
    ]

    finish(tracking, "good", "succeeded")  # by another attempt of notify
    history = client.get_metric_history(parent.info.run_id, "win_rate")
    assert [point.value for point in history] == [0.75]


PARAMS = """
preset: quick
seed: 7
ppo: {kl_coef: 0.05}
cluster:
  profiles: {cpu: {price_per_hour: 2.0}, gpu: {price_per_hour: 30.0}}
  stages: {ppo: gpu}
"""


def test_parent_answers_what_a_run_was_made_of(tracking: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    """Settings, data sets, code, cost, and the table of samples are those of its stages."""
    (tmp_path / "prompts").mkdir()
    for split, line in (("train", "a"), ("validation", "b")):
        (tmp_path / "prompts" / f"{split}.jsonl").write_text(line, encoding="utf-8")
    write_manifest(tmp_path / "prompts", kind="prompts", facts={"num_train": 3, "num_validation": 1})
    for stage in ("reward_model", "ppo"):
        tracker = start_tracking(tracking, run_id="whole", stage=stage, params={})
        tracker.log_inputs(data_sets_of({"prompts": tmp_path / "prompts"}, {}))
        tracker.log_table("validation_samples", [{"response": "x"}])
        tracker.finish("FINISHED")
    tracker = start_tracking(tracking, run_id="whole", stage="evaluation", params={})
    tracker.log_table("samples", [{"prompt": "it's", "gain": 0.5}])
    tracker.finish("FINISHED")
    parent = opened(tracking, "whole")
    hours = {"reward_model": 0.5, "ppo": 2.0, "evaluation": 0.25}
    stages = [replace(stage, seconds=3600 * hours[stage.name]) for stage in parent.stages()]
    facts = {"run_id": "whole", "decision": "promote", "reason": "it is better"}
    for _ in range(2):  # by two attempts of notify
        parent.finish(status="succeeded", stages=stages, facts=facts, params=PARAMS)
    run = parent_of(client, "whole")
    assert run.data.params["ppo.kl_coef"] == "0.05" and run.data.params["cluster.stages.ppo"] == "gpu"
    inputs = {found.dataset.name: found for found in run.inputs.dataset_inputs}
    assert set(inputs) == {"prompts.train", "prompts.validation"}
    digest = hashlib.sha256(b"a").hexdigest()
    assert inputs["prompts.train"].dataset.digest == digest[:36]
    assert json.loads(inputs["prompts.train"].dataset.profile) == {"num_rows": 3, "sha256": digest}
    assert [tag.value for tag in inputs["prompts.validation"].tags] == ["validation"]
    assert run.data.metrics["cost/hours"] == 2.75
    assert run.data.metrics["cost/price"] == pytest.approx(0.5 * 2 + 2.0 * 30 + 0.25 * 2)
    assert run.data.tags["rlhf.preset"] == "quick" and "torch" in run.data.tags["rlhf.packages"]
    assert run.data.tags["mlflow.note.content"].startswith("**Promoted**: it is better.")
    assert "price 61.50" in run.data.tags["mlflow.note.content"]
    assert run.info.run_name.startswith("quick, seed 7, 20")
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]
    table = Path(client.download_artifacts(run.info.run_id, "samples.json", str(tmp_path)))
    assert json.loads(table.read_text(encoding="utf-8")) == {"columns": ["prompt", "gain"], "data": [["it's", 0.5]]}
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment and experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_setting_that_was_changed_for_a_resumed_run_does_not_stop_its_end(
    tracking: TrackingConfig, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(tracking, "budget", "sft", {"loss": 0.5})
    parent, facts = opened(tracking, "budget"), {"run_id": "budget", "decision": "", "reason": ""}
    for params in ("preset: a\ncluster: {budget: 5.0}", "preset: a\ncluster: {budget: 9.0}", "no: [yaml"):
        parent.finish(status="failed", stages=parent.stages(), facts=facts, params=params)
    assert parent_of(client, "budget").data.params == {"preset": "a", "cluster.budget": "5.0"}
    assert parent_of(client, "budget").info.status == "FAILED" and capsys.readouterr().err == ""


@pytest.mark.parametrize("better", ["ppo", "dpo"])
def test_parent_of_two_policies_shows_the_metrics_of_the_better_one_and_the_report_of_both(
    tracking: TrackingConfig, client: MlflowClient, tmp_path: Path, better: str
) -> None:
    reports = {name: tmp_path / name / "report.html" for name in ("ppo", "both")}
    for name, path in reports.items():
        path.parent.mkdir()
        path.write_text(f"<!doctype html>{name}", encoding="utf-8")
    run_id, to_gate = f"better-{better}", float(better == "dpo")
    run_stage(tracking, run_id, "ppo_evaluation", {"win_rate": 0.75}, reports["ppo"])
    run_stage(tracking, run_id, "evaluation", {"win_rate": 0.25, GOES_TO_GATE: to_gate}, reports["both"])
    finish(tracking, run_id, "succeeded")
    parent = parent_of(client, run_id)
    ppo, dpo = {"win_rate": 0.75}, {"win_rate": 0.25, GOES_TO_GATE: to_gate}
    own, (other, name) = (ppo, (dpo, "evaluation")) if better == "ppo" else (dpo, (ppo, "ppo_evaluation"))
    assert without_cost(parent) == own | {f"{name}/{key}": value for key, value in other.items()}
    folder = Path(client.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    assert (folder / "report.html").read_text(encoding="utf-8") == "<!doctype html>both"
    assert json.loads((folder / "summary.json").read_text())["evaluation"] == own


def test_checks_of_the_parent_are_those_of_the_policy_at_the_gate(
    tracking: TrackingConfig, client: MlflowClient
) -> None:
    name = "refusals/min_rate"
    run_stage(tracking, "checked", "ppo_checks", {name: 0.95})
    run_stage(tracking, "checked", "ppo_evaluation", {"win_rate": 0.75, f"checks/{name}": 0.95})
    run_stage(tracking, "checked", "checks", {name: 0.2})  # of DPO
    run_stage(tracking, "checked", "evaluation", {"win_rate": 0.25, f"checks/{name}": 0.2, GOES_TO_GATE: 0.0})
    finish(tracking, "checked", "succeeded")
    assert parent_of(client, "checked").data.metrics[f"checks/{name}"] == 0.95


def test_parent_of_a_failed_run_names_the_error(tracking: TrackingConfig, client: MlflowClient) -> None:
    run_stage(tracking, "bad", "sft", {"loss": 0.5})
    run_stage(tracking, "bad", "ppo", {}, error="data.prompts: line 3 is broken.")
    assert opened(tracking, "bad").stages()[-1].error == "data.prompts: line 3 is broken."
    finish(tracking, "bad", "failed")
    assert parent_of(client, "bad").info.status == "FAILED"
    run_stage(tracking, "bad", "ppo", {"kl": 1.0})  # retried
    last = opened(tracking, "bad").stages()[-1]
    assert (last.name, last.status, last.error) == ("ppo", "FINISHED", "")


def test_a_status_is_announced_once(tracking: TrackingConfig) -> None:
    run_stage(tracking, "once", "sft", {})
    parent = opened(tracking, "once")
    assert not parent.was_notified("failed")
    parent.set_notified("failed")
    assert opened(tracking, "once").was_notified("failed")
    assert not opened(tracking, "once").was_notified("succeeded")  # the run was retried


@pytest.mark.parametrize(
    ("uri", "ui_url", "expected"),
    [
        ("http://mlflow.rlhf:5000", None, "http://mlflow.rlhf:5000/#/experiments/"),
        ("http://mlflow.rlhf:5000", "https://mlflow.example.com/", "https://mlflow.example.com/#/experiments/"),
        (None, None, ""),
    ],
)
def test_link_is_one_that_people_can_open(
    tracking: TrackingConfig, uri: str | None, ui_url: str | None, expected: str
) -> None:
    parent = opened(tracking, "good")
    parent._config = tracking.model_copy(update={"ui_url": ui_url, **({"uri": uri} if uri else {})})
    assert parent.link.startswith(expected) and bool(parent.link) == bool(expected)
    assert not expected or parent.link.endswith("?workflowType=machine_learning")


def test_link_to_the_experiment_names_the_one_that_exists(tracking: TrackingConfig) -> None:
    opened(tracking, "any")
    (experiment,) = [e for e in MlflowClient(tracking.uri).search_experiments() if e.name == tracking.experiment]
    address = "http://127.0.0.1:5000"
    shown = f"{address}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert experiment_link(tracking, address) == shown
    assert experiment_link(tracking.model_copy(update={"experiment": "none"}), address) == address


def test_parent_has_all_settings_and_its_name_from_the_first_stage_on(
    tracking: TrackingConfig, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(DEFAULT_PARAMS, ["seed=7", "ppo.kl_coef=0.125"])
    monkeypatch.setenv(SETTINGS_VARIABLE, own_settings(params))
    started = start_tracking(tracking, run_id="early", stage="sft", params={})
    (parent,) = [run for run in client.search_runs([_experiment(client)]) if run.data.tags["rlhf.run_id"] == "early"]
    found = parent.data.params
    assert {key: found[key] for key in ("preset", "seed", "ppo.kl_coef", "sft.batch_size", "gate.max_kl")} == {
        "preset": "quick", "seed": "7", "ppo.kl_coef": "0.125", "sft.batch_size": str(params.sft.batch_size),
        "gate.max_kl": str(params.gate.max_kl),
    }  # fmt: skip
    assert set(found) == set(flatten(json.loads(params.canonical_json())))
    assert parent.info.run_name.startswith("quick, seed 7, ")
    started.finish("FINISHED")
    opened(tracking, "early").finish(status="succeeded", stages=[], facts={"run_id": "early"}, params=dump_yaml(params))
    ended = client.get_run(parent.info.run_id)
    assert ended.data.params == found and ended.info.run_name == parent.info.run_name


@pytest.mark.parametrize("text", [None, "{", '{"unknown": 1}'])
def test_settings_of_another_version_are_left_to_the_end(
    tracking: TrackingConfig, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        monkeypatch.setenv(SETTINGS_VARIABLE, text)
    run_id = f"late-{text}"
    start_tracking(tracking, run_id=run_id, stage="sft", params={}).finish("FINISHED")
    (parent,) = [run for run in client.search_runs([_experiment(client)]) if run.data.tags["rlhf.run_id"] == run_id]
    assert parent.data.params == {} and parent.info.run_name == run_id


def _experiment(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return str(experiment.experiment_id)


# --- the MLflow plugin of Kubeflow Pipelines (backend/src/v2/common/plugins/mlflow/handler.go of 2.17) ---


@pytest.fixture
def plugin(client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The parent run of the plugin, and a function that starts a task as its driver does."""
    experiment = client.create_experiment(f"KFP-{tmp_path.name}", artifact_location=tmp_path.as_uri())
    parent = client.create_run(experiment, run_name="my run")

    def start_task(name: str) -> str:
        run = client.create_run(experiment, run_name=name, tags={"mlflow.parentRunId": parent.info.run_id})
        monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
        return str(run.info.run_id)

    return parent.info.run_id, experiment, start_task


def test_runs_of_the_kfp_plugin_are_joined(
    tracking: TrackingConfig, client: MlflowClient, plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent_id, experiment, start_task = plugin
    task = start_task("sft")
    monkeypatch.setenv(SETTINGS_VARIABLE, own_settings(load_params(DEFAULT_PARAMS, ["seed=5"])))
    run_stage(tracking, "kfp-1", "sft", {"loss": 0.5})
    assert client.get_run(parent_id).data.params["seed"] == "5"
    evaluation = start_task("evaluation")
    run_stage(tracking, "kfp-1", "evaluation", {"win_rate": 0.75})
    joined = client.get_run(task)
    assert joined.data.metrics == {"train/loss": 3.0, "final/loss": 0.5} and joined.data.params == {"seed": "1"}
    start_task("notify")
    finish(tracking, "kfp-1", "succeeded")
    assert without_cost(client.get_run(parent_id)) == {"win_rate": 0.75, "sft/loss": 0.5}
    assert client.get_run(parent_id).info.status == "RUNNING"  # Kubeflow Pipelines ends its own run
    assert len(client.search_runs([experiment])) == 4 and client.get_run(evaluation).info.status == "FINISHED"
    experiments = [client.get_experiment_by_name(name) for name in (EXPERIMENT,)]
    assert not client.search_runs(
        [e.experiment_id for e in experiments if e], filter_string="tags.`rlhf.run_id` = 'kfp-1'"
    )


def test_second_attempt_continues_the_run_of_the_kfp_plugin(
    tracking: TrackingConfig, client: MlflowClient, plugin: Any
) -> None:
    _, _, start_task = plugin
    task = start_task("ppo")
    for attempt, steps in enumerate(((1, 2, 3), (3, 4))):
        tracker = start_tracking(tracking, run_id="kfp-2", stage="ppo", params={"processes": attempt})
        for step in steps:
            tracker.log({"score": step / 4}, step)
        tracker.finish("FAILED" if attempt == 0 else "FINISHED", "lost" if attempt == 0 else "")
    history = client.get_metric_history(task, "score")
    assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    run = client.get_run(task)
    assert run.info.status == "FINISHED" and "rlhf.error" not in run.data.tags


@pytest.mark.parametrize("is_unknown", [True, False])
def test_other_run_in_the_environment_is_not_joined(
    tracking: TrackingConfig, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_unknown: bool
) -> None:
    """A run of another server, or one without a parent, which is somebody's own."""
    own = client.create_run(client.create_experiment(f"own-{is_unknown}", artifact_location=tmp_path.as_uri()))
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32 if is_unknown else own.info.run_id)
    run_stage(tracking, f"apart-{is_unknown}", "sft", {"loss": 0.5})
    assert client.get_run(own.info.run_id).data.metrics == {}
    assert [stage.name for stage in opened(tracking, f"apart-{is_unknown}").stages()] == ["sft"]
