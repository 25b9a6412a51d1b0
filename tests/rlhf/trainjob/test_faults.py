"""Outages of the API server, refusals, lost connections and cancellation."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from components.notify.result import RunResult, delete_trainjobs
from components.rlhf.text.errors import RetryableError
from components.rlhf.trainjob.logs import split_line
from components.rlhf.trainjob.manifest import job_name
from pipelines.settings import load_params, settings_of_stage
from tests.rlhf.trainjob.conftest import PLAN, RUN_ID, World, finish
from tests.support.trainjob_api import LAUNCHER_POD, NAMESPACE

ROOT = Path(__file__).resolve().parents[3]
FORBIDDEN = 'is forbidden: User "system:serviceaccount:team:rlhf-runner" cannot {} resource "{}" in API group "x"'


@pytest.mark.parametrize("fault", ["connection", 500, 401])
def test_outage_while_a_job_runs(world: World, fault: Any) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    world.api.run_pods(name, 2)
    attempt.until_said("runs on all its nodes")
    world.api.faults.drop, world.api.faults.answer = (
        fault == "connection",
        None if fault == "connection" else (fault, "later"),
    )
    world.api.drop_streams()
    attempt.until_said("the Kubernetes API does not answer")
    finish(world, name)  # during the outage
    world.api.faults.drop, world.api.faults.answer = False, None
    attempt.succeeded()
    assert any("answers again" in line for line in attempt.said)


def test_outage_before_the_job_is_created(world: World) -> None:
    world.api.faults.answer = (503, "etcd is away")
    attempt = world.launch()
    attempt.until_said("does not answer (etcd is away); trying again")
    world.api.faults.answer = None
    finish(world, world.api.wait_for_job())
    attempt.succeeded()


def test_long_outage_leaves_the_job_to_another_attempt(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    attempt.until_said("starts")
    attempt.api.outage_seconds = 0.5
    world.api.faults.answer = (503, "away")
    world.api.drop_streams()
    assert "the TrainJob continues, and another attempt of this task will find it" in attempt.failed()
    assert isinstance(attempt.error, RetryableError) and name in world.api.objects["trainjobs"]


def test_watch_continues_after_its_history_is_gone(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    attempt.until_said("starts")
    lists = world.api.requests.count("list trainjobs")
    world.api.drop_streams(forget_history=True)
    world.api.run_pods(name, 2)
    attempt.until_said("runs on all its nodes")
    assert world.api.requests.count("list trainjobs") > lists
    world.api.drop_streams()
    finish(world, name)
    attempt.succeeded()


def test_log_has_each_line_once_when_connections_break(world: World, capfd: Any) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    pods = world.api.run_pods(name, 2)
    expected = []
    for round_ in range(4):
        lines = [f"round {round_} line {i}" for i in range(5)] + ["the same"] * 2
        expected += lines
        world.api.say(pods[0], *lines)
        threading.Event().wait(0.1)
        world.api.drop_streams()
    finish(world, name)
    attempt.succeeded()
    shown = [line.removeprefix("node 0: ") for line in capfd.readouterr().out.splitlines() if line.startswith("node 0")]
    assert shown == expected


def test_stamps_without_final_zeros_are_compared_as_times() -> None:
    whole, half, nano = (split_line(f"2026-01-01T00:00:00{x}Z a", ("", 0))[0] for x in ("", ".5", ".123456789"))
    assert sorted([half, nano, whole]) == [whole, nano, half]
    assert split_line("no stamp", ("x", 1)) == (("x", 1), "no stamp")


@pytest.mark.parametrize(
    ("verb", "resource", "rule"),
    [("create", "trainjobs", "create trainjobs.trainer.kubeflow.org"), ("get", "pods", "get pods"),
     ("list", "trainjobs", "watch trainjobs.trainer.kubeflow.org"), ("list", "pods", "watch pods"),
     ("watch", "pods", "watch pods")],
)  # fmt: skip
def test_missing_permission_names_verb_resource_and_manifest(world: World, verb: str, resource: str, rule: str) -> None:
    world.api.faults.refuse[verb, resource] = (403, FORBIDDEN.format(verb, resource))
    attempt = world.launch()
    message = attempt.failed()
    if verb == "list":
        rule = rule if rule in message else rule.replace("watch", "list")
    assert f"may not {rule} in namespace {NAMESPACE}; apply manifests/components/trainjob" in message
    assert not isinstance(attempt.error, RetryableError)


def test_log_without_permission_does_not_fail_the_task(world: World, capfd: Any) -> None:
    world.api.faults.refuse["get", "pods/log"] = (403, FORBIDDEN.format("get", "pods/log"))
    attempt = world.launch()
    name = world.api.wait_for_job()
    world.api.run_pods(name, 2)
    attempt.until_said("runs on all its nodes")
    finish(world, name)
    attempt.succeeded()
    assert "the log cannot be read" in capfd.readouterr().out


def test_cluster_without_trainer(world: World) -> None:
    world.api.faults.refuse["create", "trainjobs"] = (404, "404 page not found")
    assert (
        "has no trainjobs.trainer.kubeflow.org/v1alpha1; install Kubeflow Trainer 2.2 or newer"
        in world.launch().failed()
    )


def test_trainer_that_is_too_old(world: World) -> None:
    world.api.faults.refuse["create", "trainjobs"] = (400, 'strict decoding error: unknown field "spec.runtimePatches"')
    assert "too old for this TrainJob" in world.launch().failed()


def test_missing_runtime(world: World) -> None:
    world.api.runtimes = set()
    assert "The TrainJob's runtime was refused" in world.launch().failed()


def test_quota_of_the_namespace(world: World) -> None:
    world.api.faults.refuse["create", "trainjobs"] = (403, "exceeded quota: rlhf, requested: count/trainjobs=1")
    assert (
        "Kubernetes refused to create trainjobs.trainer.kubeflow.org in namespace team: exceeded quota"
        in world.launch().failed()
    )


# Runs a stage with only the packages of the tools image, in which the task runs.
PROGRAM = """
import importlib.abc, importlib.metadata, runpy, sys
from images.lock import ROOT, pins
pinned = pins(ROOT / "images/tools/constraints.txt")
absent = {
    module
    for module, names in importlib.metadata.packages_distributions().items()
    if not {name.lower().replace("_", "-").replace(".", "-") for name in names} & {*pinned, "mlflow", "kfp-rlhf"}
}
class OnlyTools(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, OnlyTools())
assert {"torch", "kfp", "numpy"} <= absent
runpy.run_module("components.sft", run_name="__main__")
"""


def start_program(world: World, tmp_path: Path) -> "subprocess.Popen[str]":
    """The task of sft as a process, as in its pod."""
    attempt = world.launch(stage="template")  # for its arguments
    attempt.until_said("created")
    task = attempt.task
    values = {
        "settings": settings_of_stage(load_params(ROOT / "pipelines/params/tiny.yaml"), "sft"),
        "executor-input": task.executor_input,
        "storage": task.storage,
    }
    values |= {"base-model": task.reads["base_model"], "demonstrations": task.reads["base_model"]}
    values |= {name: task.writes["model"].with_name(name) for name in ("model", "metrics", "summary")}
    options = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RLHF_TRAINJOB": PLAN.canonical_json(), "RLHF_RUN_ID": RUN_ID,
                                "RLHF_POD_NAME": LAUNCHER_POD, "RLHF_POD_NAMESPACE": NAMESPACE,
                                "KUBECONFIG": write_kubeconfig(world, tmp_path)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def write_kubeconfig(world: World, folder: Path) -> str:
    context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
    content = {"clusters": [{"name": "x", "cluster": {"server": world.url}}], "users": [{"name": "x", "user": {}}],
               "contexts": [context], "current-context": "x"}  # fmt: skip
    (folder / "kubeconfig").write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **content}))
    return str(folder / "kubeconfig")


def test_cancelled_task_deletes_its_job_and_waits_for_the_pods(world: World, tmp_path: Path) -> None:
    process = start_program(world, tmp_path)
    try:
        world.api.until(lambda: len(world.api.objects["trainjobs"]) == 2, 60)
        name = job_name(RUN_ID, "sft")
        world.api.run_pods(name, 2)
        assert process.stdout
        for line in process.stdout:
            if "runs on all its nodes" in line:
                break
        world.api.pods_outlive_job_seconds = 0.5
        process.terminate()
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"deleting TrainJob {name}" in output and f"TrainJob {name} is deleted" in output
    assert name not in world.api.objects["trainjobs"]
    assert not [pod for pod in world.api.objects["pods"] if pod.startswith(f"{name}-node")]


def test_failed_task_ends_with_one_line(world: World, tmp_path: Path) -> None:
    process = start_program(world, tmp_path)
    try:
        world.api.until(lambda: len(world.api.objects["trainjobs"]) == 2, 60)
        world.api.fail(job_name(RUN_ID, "sft"))
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in output
    assert output.splitlines()[-1].startswith(f"error: TrainJob {job_name(RUN_ID, 'sft')} failed (FailedJobs:")


@pytest.mark.parametrize(("status", "left"), [("succeeded", 0), ("canceled", 1)])
def test_notify_deletes_what_a_run_has_left(
    world: World, monkeypatch: pytest.MonkeyPatch, status: str, left: int, tmp_path: Path
) -> None:
    """Jobs that still run, as after a run was terminated; those that have ended only if the run has succeeded. No job of another run."""
    world.launch(stage="sft"), world.launch(stage="ppo"), world.launch(stage="ppo", run_id="another")
    world.api.until(lambda: len(world.api.objects["trainjobs"]) == 3)
    ended, others = job_name(RUN_ID, "sft"), job_name("another", "ppo")
    world.api.fail(ended)
    monkeypatch.setenv("KUBECONFIG", write_kubeconfig(world, tmp_path))
    delete_trainjobs(RunResult(status, RUN_ID))
    world.api.until(lambda: len(world.api.objects["trainjobs"]) == 1 + left)
    assert set(world.api.objects["trainjobs"]) == {others} | ({ended} if left else set())


def test_notify_without_permission_warns(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    delete_trainjobs(RunResult("failed", RUN_ID))
    assert "TrainJobs of this run could not be deleted (The Kubernetes API cannot be used" in capfd.readouterr().err
