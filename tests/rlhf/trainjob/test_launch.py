"""A stage as a TrainJob, against a server that speaks the published API."""

import json
from pathlib import Path

import pytest

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.config.trainjob import PLAN_VARIABLE
from components.rlhf.text.errors import RetryableError
from components.rlhf.trainjob.jobs import delete_job
from tests.rlhf.trainjob.conftest import PLAN, RUN_ID, World, finish
from tests.support.trainjob_api import TRAINJOB, WORKFLOW_UID


def test_outputs_and_metadata_of_the_job_become_those_of_the_task(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    pods = world.api.run_pods(name, 2)
    attempt.until_said(f"TrainJob {name} runs on all its nodes")
    world.api.say(pods[0], "step 1", "step 2")
    world.api.say(pods[1], "not shown")
    world.deliver()
    for pod in pods:
        world.api.end_pod(pod, 0)
    world.api.complete(name)
    attempt.succeeded()
    task = attempt.task
    assert open_artifact(task.writes["model"], "sft_model").facts == {"loss": 0.5}
    assert (task.writes["model"] / "sub" / "config.json").read_text() == "{}"
    assert json.loads(task.writes["metrics"].read_text()) == {"loss": 0.5}
    output = json.loads((world.folder / "attempt1" / "executor_output.json").read_text())
    model = output["artifacts"]["model"]["artifacts"][0]
    assert model["uri"] == "s3://kfp/1/model" == model["metadata"]["model_uri"]
    assert output["artifacts"]["metrics"]["artifacts"][0]["metadata"] == {"loss": 0.5}
    shown = capfd.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("node ")] == ["node 0: step 1", "node 0: step 2"]


def test_job_has_the_plan_the_command_and_the_workflow_as_owner(world: World) -> None:
    world.launch(settings='{"a": "$(HOME)"}')
    name = world.api.wait_for_job()
    job = world.api.job
    TRAINJOB.validate(job)
    assert job["metadata"]["ownerReferences"] == [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": WORKFLOW_UID}
    ]
    assert job["metadata"]["labels"]["pipeline/runid"] == RUN_ID
    assert len(f"{name}-node-0-1023-abcde") <= 63
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 8, PLAN.image)
    assert trainer["resourcesPerNode"] == {side: dict(PLAN.resources) for side in ("requests", "limits")}
    assert trainer["command"] == ["python", "-m", "components.sft"]
    options = dict(zip(trainer["args"][::2], trainer["args"][1::2], strict=True))
    assert options["--settings"] == '{"a": "$$(HOME)"}'  # Kubernetes would replace $(HOME)
    (folder,) = (world.shared / f"run-{RUN_ID}" / "inputs").iterdir()
    assert options["--base-model"] == str(folder)
    assert open_artifact(folder, "base_model")
    assert options["--model"] == f"{world.shared}/run-{RUN_ID}/outputs/sft/files/model"
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]
    assert pod["metadata"]["labels"] == {**PLAN.labels, "pipeline/runid": RUN_ID}
    assert pod["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert pod["spec"]["containers"] == [{"name": "node", "volumeMounts": list(PLAN.volume_mounts)}]


def test_stage_that_trains_nothing_has_one_node(world: World) -> None:
    world.launch(num_processes=1)
    world.api.wait_for_job()
    trainer = world.api.job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 1)


def test_two_tasks_of_a_stage_have_two_jobs(world: World) -> None:
    world.launch(stage="reward_model"), world.launch(stage="judge_reward_model")
    world.api.until(lambda: len(world.api.objects["trainjobs"]) == 2)


def test_inputs_are_copied_once(world: World) -> None:
    first = world.launch()
    name = world.api.wait_for_job()
    (folder,) = (world.shared / f"run-{RUN_ID}" / "inputs").iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    second = world.launch(stage="reward_model")
    world.api.until(lambda: len(world.api.objects["trainjobs"]) == 2)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert any("copying" in line for line in first.said) and not any("copying" in line for line in second.said)
    assert name


def test_interrupted_copy_of_an_input_is_completed(world: World) -> None:
    first = world.launch()
    world.api.wait_for_job()
    (folder,) = (world.shared / f"run-{RUN_ID}" / "inputs").iterdir()
    (folder / "manifest.json").unlink()
    (folder / "tokenizer" / "vocab.txt").write_text("a")
    world.launch(stage="reward_model")
    world.api.until(lambda: len(world.api.objects["trainjobs"]) == 2)
    assert open_artifact(folder, "base_model") and first


# --- attempts


def test_retried_task_takes_over_the_running_job(world: World) -> None:
    world.launch()
    name = world.api.wait_for_job()
    uid = world.api.job["metadata"]["uid"]
    second = world.launch()  # KFP gave it other URIs
    second.until_said("found TrainJob")
    finish(world, name)
    second.succeeded()
    assert world.api.job["metadata"]["uid"] == uid
    output = json.loads((world.folder / "attempt2" / "executor_output.json").read_text())
    model = output["artifacts"]["model"]["artifacts"][0]
    assert model["uri"] == model["metadata"]["model_uri"] == "s3://kfp/2/model"


def test_job_that_finished_before_the_retry_is_not_run_again(world: World) -> None:
    world.launch()
    name = world.api.wait_for_job()
    finish(world, name)
    second = world.launch()
    second.succeeded()
    assert (second.task.writes["model"] / "model.safetensors").read_text() == "weights"
    assert world.api.requests.count("create trainjobs") == 2 and len(world.api.objects["trainjobs"]) == 1


@pytest.mark.parametrize("change", ["failed", "settings", "outputs"])
def test_job_is_replaced(world: World, change: str) -> None:
    """If it failed, is one of other settings, or its outputs are gone."""
    first = world.launch()
    name = world.api.wait_for_job()
    uid = world.api.job["metadata"]["uid"]
    world.api.pods_outlive_job_seconds = 0.3
    if change == "failed":
        world.api.fail(name)
        first.failed()
    elif change == "outputs":
        world.api.complete(name)
        assert "has no outputs of it" in first.failed()
    second = world.launch(settings='{"other": 1}' if change == "settings" else "{}")
    second.until_said("replacing TrainJob")
    world.api.until(lambda: [j["metadata"]["uid"] for j in world.api.objects["trainjobs"].values()] not in ([], [uid]))
    finish(world, name)
    second.succeeded()


def test_outputs_of_another_job_are_not_taken(world: World) -> None:
    first = world.launch()
    name = world.api.wait_for_job()
    world.deliver({"model.safetensors": "old"})
    world.api.fail(name)
    first.failed()
    second = world.launch(settings='{"other": 1}')
    second.until_said("created TrainJob")
    world.api.complete(name)  # without a delivery of its own
    assert "has no outputs of it" in second.failed()
    assert not second.task.writes["model"].exists()


def test_damaged_output_is_not_taken(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    world.deliver()
    (world.shared / f"run-{RUN_ID}/outputs/sft/files/model/model.safetensors").write_text("weightz")
    world.api.complete(name)
    assert "sha256 differs" in attempt.failed()
    assert isinstance(attempt.error, RetryableError) and not attempt.task.writes["model"].exists()


def test_create_whose_answer_was_lost_is_found(world: World) -> None:
    world.api.faults.lose_next_create = True
    attempt = world.launch()
    attempt.until_said("found TrainJob")
    finish(world, world.api.wait_for_job())
    attempt.succeeded()


def test_name_that_belongs_to_something_else(world: World) -> None:
    first = world.launch()
    name = world.api.wait_for_job()
    stranger = world.api.job
    stranger["metadata"]["annotations"] = {}
    world.api.put("trainjobs", stranger)
    second = world.launch()
    assert "belongs to something else" in second.failed()
    assert name in world.api.objects["trainjobs"] and first
    assert "delete trainjobs" not in world.api.requests


@pytest.mark.parametrize("run_id", ["x" * 300, "run id with spaces", "Ünïcode", "-", "a.b_c"])
def test_hostile_run_ids_give_valid_objects(world: World, run_id: str) -> None:
    world.launch(run_id=run_id) if len(run_id) < 200 else world.launch(run_id=run_id[:200])
    name = world.api.wait_for_job()  # the server has validated name and labels
    assert name.startswith("rlhf-sft-") and len(name) < 45


def test_folder_that_is_not_an_artifact(world: World) -> None:
    (world.folder / "empty").mkdir()
    assert "has no manifest.json" in world.launch(reads={"base_model": world.folder / "empty"}).failed()


def test_plan_of_another_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, json.dumps({"nodes": 2}))
    assert "compile the pipeline again" in world.launch().failed()


def test_exchange_on_a_volume_is_deleted_after_the_last_stage(world: World) -> None:
    run = Path(world.shared / f"run-{RUN_ID}")
    attempt = world.launch(stage="evaluation")
    finish(world, world.api.wait_for_job())
    attempt.succeeded()
    assert attempt.task.writes["model"].is_dir() and not run.exists()


def test_deletion_spares_a_job_that_has_taken_the_name_since(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    attempt.until_said("starts")
    before = world.api.job
    world.api.remove("trainjobs", name)
    attempt.failed()
    world.api.put("trainjobs", {**before, "metadata": {**before["metadata"], "uid": "another"}})
    delete_job(attempt.api, before)
    assert not world.api.job["metadata"].get("deletionTimestamp")
