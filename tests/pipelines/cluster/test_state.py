"""`status` and `logs` of a run in Kubeflow Pipelines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from kubernetes import client, config

from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from tests.support.kfp_api import KfpApi, serving

START, END = "2026-01-01T00:00:00Z", "2026-01-01T00:02:05Z"


def detail(name: str, state: str, **more: Any) -> dict[str, Any]:
    return {"display_name": name, "state": state, "start_time": START, "end_time": END} | more


@pytest.fixture
def api() -> KfpApi:
    api = KfpApi()
    api.runs["r1"] = {"run_id": "r1", "display_name": "mine"}
    api.task_details = [
        detail("root", "RUNNING"),
        detail("import-model-driver", "SUCCEEDED"),
        detail("import-model", "SUCCEEDED"),
        detail("SFT", "CACHED"),
        detail("reward-model-2", "FAILED", error={"code": 13, "message": "error: no\n space left"}),
        {"display_name": "ppo", "state": "PENDING"},
    ]
    return api


@pytest.fixture
def host(api: KfpApi) -> Iterator[str]:
    with serving(api) as address:
        yield address


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def test_status_lists_the_stages_of_a_run(api: KfpApi, host: str) -> None:
    api.states = ["RUNNING"]
    found = json.loads(invoke("status", "r1", "--host", host, "--json").output)
    assert found["state"] == "running"
    assert [(task["name"], task["state"], task["seconds"]) for task in found["tasks"]] == [
        ("import_model", "succeeded", 125.0), ("sft", "succeeded", 125.0), ("reward_model_2", "failed", 125.0), ("ppo", "waiting", 0.0),
    ]  # fmt: skip
    assert found["tasks"][2]["line"] == "error: no space left"


@pytest.mark.parametrize(("state", "code", "shown"), [("SUCCEEDED", 0, "succeeded"), ("FAILED", 1, "failed")])
def test_follow_ends_with_the_run(api: KfpApi, host: str, state: str, code: int, shown: str) -> None:
    api.states = [state]
    result = invoke("status", "r1", "--host", host, "--follow", "--json")
    assert result.exit_code == code and json.loads(result.output)["state"] == shown


def test_unknown_run_is_named(host: str) -> None:
    result = invoke("status", "r2", "--host", host)
    assert isinstance(result.exception, InputError) and "Run r2 not found" in str(result.exception)


class Pods:
    """What logs uses of CoreV1Api: two attempts of ppo, listed in the wrong order."""

    def __init__(self, _: Any = None) -> None:
        return

    def list_namespaced_pod(self, namespace: str, label_selector: str, **_: Any) -> Any:
        assert namespace == "team"
        names = ["second", "first"] if label_selector == "pipeline/runid=r1,kfp-rlhf/stage=ppo" else []
        pods = [
            client.V1Pod(metadata=client.V1ObjectMeta(name=name, creation_timestamp=f"2026-{len(name)}"))
            for name in names
        ]
        return client.V1PodList(items=pods)

    def read_namespaced_pod_log(self, name: str, namespace: str, container: str, **_: Any) -> str:
        assert (namespace, container) == ("team", "main")
        return f"{name} 1\n{name} 2\n"


def test_logs_of_all_attempts_of_a_stage(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CoreV1Api", Pods)
    monkeypatch.setattr(config, "new_client_from_config", lambda context: None)
    command = ("logs", "r1", "ppo", "--host", host, "--namespace", "team")
    assert invoke(*command).output == "first 1\nfirst 2\nsecond 1\nsecond 2\n"
    assert invoke(*command, "--tail", "1").output == "first 2\nsecond 2\n"
    missing = invoke("logs", "r1", "sft", *command[3:])
    assert isinstance(missing.exception, InputError) and "No pod of stage sft" in str(missing.exception)


def test_logs_without_a_kubectl_context(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    result = invoke("logs", "r1", "ppo", "--host", host)
    assert isinstance(result.exception, InputError) and "choose another --kube-context" in str(result.exception)
