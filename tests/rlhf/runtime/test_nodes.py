"""Launchers that find each other, with node ranks as threads of this process, and the variables that they start from."""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.processes import Processes
from components.rlhf.runtime import job, nodes
from components.rlhf.runtime.job import join
from components.rlhf.runtime.nodes import Nodes, choose_interface, nodes_of_job, processes_per_node
from components.rlhf.text.errors import InputError, RetryableError

PET = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"}
SHORT = 0.03  # minutes


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PET, "PET_NPROC_PER_NODE", nodes.GLOO_INTERFACE):
        monkeypatch.delenv(name, raising=False)
    for name, seconds in {"POLL": 0.02, "LOG": 0.1, "BEAT": 0.1, "GONE": 0.5, "SILENT": 0.6, "GRACE": 0.2}.items():
        monkeypatch.setattr(job, f"{name}_SECONDS", seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def port() -> int:
    return free_port()


def node(rank: int, port: int, *, number: int = 2, address: str = "127.0.0.1") -> Nodes:
    return Nodes(number=number, rank=rank, address=address, port=port)


class Background:
    """Calls a function in a thread; result() gives what it returned or raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self.log: list[str] = []

        def call() -> None:
            try:
                self.outcome = function()
            except BaseException as error:
                self.outcome = error

        self.thread = threading.Thread(target=call)
        self.thread.start()

    def result(self) -> Any:
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        return self.outcome


def joining(rank: int, port: int, *, minutes: float = 0.5, number: int = 2) -> Background:
    lines: list[str] = []
    found = Background(lambda: join(node(rank, port, number=number), timeout_minutes=minutes, log=lines.append))
    found.log = lines
    return found


# --- variables ---


def set_variables(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in (PET | changes).items():
        monkeypatch.setenv(name, value)


def test_variables_of_a_train_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for processes in ("auto", "cpu", "gpu", "64"):
        set_variables(monkeypatch, PET_NPROC_PER_NODE=processes)
        assert nodes_of_job() == Nodes(number=2, rank=1, address="job-node-0-0.job", port=29400)


def test_one_node_is_no_job_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes_of_job() is None
    set_variables(monkeypatch, PET_NNODES="1", PET_NODE_RANK="0")
    assert nodes_of_job() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PET_NNODES": "1:4"}, "PET_NNODES is '1:4'; set it to a number."),
        ({"PET_NODE_RANK": ""}, "PET_NODE_RANK is ''; set it to a number."),
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK is 2 and PET_NNODES is 2"),
        ({"PET_MASTER_ADDR": ""}, "PET_MASTER_ADDR is missing"),
        ({"PET_MASTER_PORT": "http"}, "PET_MASTER_PORT is 'http'"),
    ],
)
def test_invalid_variables_are_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str) -> None:
    set_variables(monkeypatch, **changes)
    with pytest.raises(InputError, match=message):
        nodes_of_job()


def processes(number: int, *, engine: str = "hf", tensor_parallel_size: int = 1) -> Processes:
    rollout = {"engine": engine, "num_prompts": 48, "vllm": {"tensor_parallel_size": tensor_parallel_size}}
    ppo = {"minibatch": 24, "rollout": rollout, "training": {"num_processes": number}}
    return PpoStageConfig.model_validate({"model": {}, "ppo": ppo, "checkpoint": {}, "seed": 0}).processes


def test_processes_are_shared_equally_by_the_nodes() -> None:
    assert processes_per_node("ppo", processes(8), node(0, 1)) == 4
    with pytest.raises(InputError, match="ppo.training.num_processes is 3, which 2 nodes"):
        processes_per_node("ppo", processes(3), node(0, 1))
    with pytest.raises(InputError, match="judge runs in one process, and PET_NNODES is 2"):
        processes_per_node("judge", Processes(), node(0, 1))


def test_vllm_engine_lies_within_a_node() -> None:
    assert processes_per_node("ppo", processes(8, engine="vllm", tensor_parallel_size=4), node(0, 1)) == 4
    assert processes_per_node("ppo", processes(8, tensor_parallel_size=8), node(0, 1)) == 4  # not used by hf
    with pytest.raises(
        InputError, match="rollout.vllm.tensor_parallel_size of ppo is 8, but must divide the 4 processes"
    ):
        processes_per_node("ppo", processes(8, engine="vllm", tensor_parallel_size=8), node(0, 1))


def test_gloo_gets_the_interface_that_leads_to_node_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = next(name for _, name in socket.if_nameindex() if "127.0.0.1" in nodes._addresses(name))
    choose_interface(node(1, 29400))
    assert os.environ[nodes.GLOO_INTERFACE] == loopback
    monkeypatch.setenv(nodes.GLOO_INTERFACE, "eth7")
    choose_interface(node(1, 29400))
    assert os.environ[nodes.GLOO_INTERFACE] == "eth7"


# --- joining ---


def test_nodes_join_in_any_order_and_share_an_id(port: int) -> None:
    second = joining(1, port)
    time.sleep(0.3)
    assert second.log and second.log[0].startswith(f"waiting for node rank 0 at 127.0.0.1:{port}")
    first = joining(0, port)
    assert first.result().run_id == second.result().run_id


def test_node_rank_0_says_whom_it_waits_for_and_all_fail_together(port: int) -> None:
    first, third = (joining(rank, port, minutes=SHORT, number=3) for rank in (0, 2))
    for found in (first, third):
        error = found.result()
        assert isinstance(error, RetryableError)
        assert str(error) == "node rank 1 of 3 did not join within training.timeout_minutes (0.03); look at the pod."
    assert first.log[0] in ("waiting for 2 of 3 nodes (node ranks 1, 2)", "waiting for 1 of 3 nodes (node rank 1)")


def test_node_without_a_node_rank_0_names_its_address(port: int) -> None:
    error = joining(1, port, minutes=SHORT).result()
    assert isinstance(error, RetryableError)
    assert f"node rank 1 of 2 found no node rank 0 at 127.0.0.1:{port} within 0.03 minutes" in str(error)


def test_name_that_does_not_resolve_is_waited_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, calls = socket.getaddrinfo, []

    def late(host: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(host)
        if host == "job-node-0-0.job":
            if len(calls) < 5:
                raise socket.gaierror(-2, "Name or service not known")
            host = "127.0.0.1"
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    with pytest.raises(
        RetryableError, match=r"no node rank 0 at job-node-0-0.job:\d+ within 0.03 minutes \(it is not listening\)"
    ):
        join(node(1, port, address="job-node-0-0.job"), timeout_minutes=SHORT, log=print)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, "unknown")))
    with pytest.raises(RetryableError, match="the name does not resolve"):
        join(node(1, port, address="job-node-0-0.job"), timeout_minutes=SHORT, log=print)


def test_node_that_comes_after_the_group_is_complete_is_refused(port: int) -> None:
    first, second = joining(0, port), joining(1, port)
    jobs = [first.result(), second.result()]
    error = joining(1, port).result()
    assert isinstance(error, RetryableError)
    assert "node rank 1 of 2 came too late: a node of this rank (" in str(error)
    assert len(jobs) == 2  # their store existed until here


def test_nodes_with_different_numbers_of_nodes_are_refused(port: int) -> None:
    first = joining(0, port, minutes=SHORT)
    error = joining(2, port, number=3).result()
    assert isinstance(error, InputError)
    assert "PET_NNODES is 3 on node rank 2, and 2 on node rank 0" in str(error)
    assert isinstance(first.result(), RetryableError)


def test_address_of_another_machine_is_refused_on_node_rank_0(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "REQUEST", timedelta(seconds=1))
    with pytest.raises(RetryableError, match="node rank 0 cannot listen at 192.0.2.1"):
        join(node(0, port, address="192.0.2.1"), timeout_minutes=SHORT, log=print)


# --- watching ---


@pytest.fixture
def jobs(port: int) -> list[job.Job]:
    return [found.result() for found in (joining(0, port), joining(1, port))]


def test_failure_of_a_node_is_told_to_the_others(jobs: list[job.Job]) -> None:
    with jobs[0].watching(), jobs[1].watching():
        jobs[1].fail("error: no data.")
        host = socket.gethostname()
        assert jobs[0].cause() == f"error: node rank 1 ({host}) failed: no data."


def test_silent_node_is_gone(jobs: list[job.Job], monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[bool] = []
    monkeypatch.setattr(job, "_kill_children", lambda: killed.append(True))
    with jobs[0].watching():
        with jobs[1].watching():
            time.sleep(1.5)  # longer than a silent node would be given
            assert not killed
        time.sleep(2.0)
        assert killed
        assert f"node rank 1 ({socket.gethostname()}) is gone: it has sent no sign of life for" in jobs[0].lost


def test_node_that_has_succeeded_may_be_silent(jobs: list[job.Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_kill_children", lambda: pytest.fail("killed"))
    jobs[1].succeed()
    with jobs[0].watching():
        time.sleep(1.5)
    assert jobs[0].lost == ""
