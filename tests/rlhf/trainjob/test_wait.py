"""What a task says while it waits for its TrainJob, and how it tells the ends of a job apart."""

import threading
from typing import Any

import pytest

from components.rlhf.config.trainjob import PLAN_VARIABLE
from components.rlhf.runtime.termination import FINAL_PREFIX, message_of
from components.rlhf.text.errors import RetryableError
from components.rlhf.trainjob.pods import failures, node_of, pending_reason
from components.rlhf.trainjob.wait import wait_for
from tests.rlhf.trainjob.conftest import PLAN, World, finish
from tests.support.trainjob_api import NAMESPACE

QUEUED = PLAN.model_copy(update={"queue": "rlhf"})


@pytest.fixture
def queued(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv(PLAN_VARIABLE, QUEUED.canonical_json())
    return world


# --- suspension


def test_suspended_job_is_waited_for_without_polling(queued: World) -> None:
    attempt = queued.launch()
    name = queued.api.wait_for_job()
    queued.api.suspend(name)
    attempt.until_said("is suspended in the queue rlhf until it is admitted (Suspended: TrainJob is suspended)")
    assert any(f"kubectl -n {NAMESPACE} describe workloads" in line for line in attempt.said)
    before = len(queued.api.requests)
    threading.Event().wait(0.5)  # 25 times what this client waits before it asks again
    assert len(queued.api.requests) == before, "requests while nothing happens"
    queued.api.admit(name)
    queued.api.run_pods(name, 2)
    attempt.until_said("runs on all its nodes")
    finish(queued, name)
    attempt.succeeded()


def test_preempted_job_resumes_with_new_pods_whose_log_is_followed(queued: World, capfd: Any) -> None:
    attempt = queued.launch()
    name = queued.api.wait_for_job()
    queued.api.admit(name)
    first = queued.api.run_pods(name, 2)
    queued.api.say(first[0], "before")
    attempt.until_said("runs on all its nodes")
    threading.Event().wait(0.5)
    queued.api.suspend(name)
    attempt.until_said("again, and will resume from its latest checkpoint")
    queued.api.admit(name)
    second = queued.api.run_pods(name, 2)
    queued.api.say(second[0], "after")
    finish(queued, name)
    attempt.succeeded()
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith("node ")]
    assert shown == ["node 0: before", "node 0: after"]


# --- ends


def test_failure_names_the_node_the_code_and_its_message(world: World, capfd: Any) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    pods = world.api.run_pods(name, 2)
    world.api.say(pods[1], *[f"line {i}" for i in range(30)])
    world.api.end_pod(pods[1], 1, message="error: data/x.jsonl:3 is not JSON; correct it.")
    world.api.end_pod(pods[0], 143)
    world.api.fail(name)
    message = attempt.failed()
    assert message == (
        f"TrainJob {name} failed: node 1 (pod {pods[1]}) ended with exit code 1: data/x.jsonl:3 is not JSON; correct it.; "
        "1 other nodes ended after it"
    )
    assert not isinstance(attempt.error, RetryableError), "the stage's own error is final"
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith("node 1")]
    assert shown == [f"node 1: line {i}" for i in range(10, 30)]
    assert name in world.api.objects["trainjobs"], "a failed job stays, to be looked at"


def test_crash_is_worth_another_attempt(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    pods = world.api.run_pods(name, 2)
    world.api.end_pod(pods[0], 1, message="RuntimeError: NCCL error")
    world.api.fail(name)
    assert "node 0" in attempt.failed() and "RuntimeError: NCCL error" in str(attempt.error)
    assert isinstance(attempt.error, RetryableError)


BUDGET = "error: cluster.budget is 500, and this run has spent 501.10 (sft 90.00, ppo 411.10); nothing is saved."


@pytest.mark.parametrize("first", [0, 1])
def test_spent_budget_is_final_whichever_node_ends_first(world: World, first: int) -> None:
    """One node says it, and the other may end before because its peers are gone."""
    attempt = world.launch()
    name = world.api.wait_for_job()
    pods = world.api.run_pods(name, 2)
    world.api.end_pod(pods[first], 1, message=BUDGET if first == 0 else "node rank 0 (a) is gone")
    world.api.end_pod(pods[1 - first], 1, message="node rank 0 (a) is gone" if first == 0 else BUDGET)
    world.api.fail(name)
    assert "node 0" in attempt.failed() and BUDGET.removeprefix("error: ") in str(attempt.error)
    assert not isinstance(attempt.error, RetryableError)
    assert attempt.error is not None and message_of(attempt.error).startswith(FINAL_PREFIX), "Argo does not retry it"
    assert world.api.requests.count("create trainjobs") == 1


def test_out_of_memory_is_told(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    pods = world.api.run_pods(name, 2)
    world.api.end_pod(pods[0], 143)
    world.api.end_pod(pods[1], 137, reason="OOMKilled")
    world.api.fail(name)
    assert "node 1" in attempt.failed() and "(OOMKilled); the node's memory limit is too small" in str(attempt.error)


def test_deadline_is_told_from_failure(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    pods = world.api.run_pods(name, 2)
    for pod in pods:  # the controller deletes the JobSet, and with it its pods
        world.api.remove("pods", pod)
    world.api.fail(name, "DeadlineExceeded", "TrainJob exceeded its active deadline")
    assert "reached its time limit of 1 hours; raise cluster.timeout_hours" in attempt.failed()
    assert isinstance(attempt.error, RetryableError)


def test_failed_job_without_pods(world: World) -> None:
    attempt = world.launch()
    world.api.fail(world.api.wait_for_job())
    assert (
        "(FailedJobs: jobset failed due to one or more job failures), and none of its pods is left" in attempt.failed()
    )


def test_job_deleted_by_someone(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    attempt.until_said("starts")
    threading.Event().wait(0.3)
    world.api.remove("trainjobs", name)
    assert "was deleted while it ran" in attempt.failed() and isinstance(attempt.error, RetryableError)


def test_job_deleted_before_it_is_watched(world: World) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    job = world.api.job
    attempt.until_said("starts")
    world.api.remove("trainjobs", name)
    attempt.failed()
    with pytest.raises(RetryableError, match="was deleted while it ran"):
        wait_for(attempt.api, job, print)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                             "message": "0/9 nodes are available: 9 Insufficient nvidia.com/gpu."}]},
            "node 0 waits: Unschedulable: 0/9 nodes are available: 9 Insufficient nvidia.com/gpu.",
        ),
        (
            {"containerStatuses": [{"name": "node", "image": "x",
                                    "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]},
            "node 0 waits: ImagePullBackOff: no such image",
        ),
    ],
)  # fmt: skip
def test_pods_that_do_not_start_say_why_once(world: World, status: Any, said: str) -> None:
    attempt = world.launch()
    name = world.api.wait_for_job()
    (pod,) = world.api.add_pods(name, 1, **status)
    attempt.until_said(said)
    world.api.update("pods", pod, metadata__annotations={"seen": "again"})
    finish(world, name)
    attempt.succeeded()
    assert attempt.said.count(said) == 1


def test_causes_are_sorted_by_time_and_signals_come_last() -> None:
    def pod(index: int, code: int, at: str, reason: str = "Error") -> dict[str, Any]:
        state = {"terminated": {"exitCode": code, "reason": reason, "finishedAt": at}}
        return {
            "metadata": {"name": f"p{index}", "labels": {"batch.kubernetes.io/job-completion-index": str(index)}},
            "status": {
                "phase": "Failed" if code else "Succeeded",
                "containerStatuses": [{"name": "node", "state": state}],
            },
        }

    found = failures([pod(0, 143, "1"), pod(1, 1, "3"), pod(2, 1, "2"), pod(3, 0, "0"), pod(4, 137, "4", "OOMKilled")])
    assert [f.node for f in found] == [2, 1, 4, 0]
    evicted = {
        "metadata": {"name": "p", "labels": {}},
        "status": {"phase": "Failed", "reason": "Evicted", "message": "disk"},
    }
    (failure,) = failures([evicted])
    assert str(failure) == "node -1 (pod p) ended (Evicted): disk"


@pytest.mark.parametrize("status", [None, {}, {"conditions": None}, {"containerStatuses": [{"name": "node"}]}])
def test_pods_without_a_status_yet(status: Any) -> None:
    pod = {"metadata": {"name": "p", "labels": None}, "status": status}
    assert (node_of(pod), pending_reason(pod), failures([pod])) == (-1, "", [])
