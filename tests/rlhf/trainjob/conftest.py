import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.config.storage import StorageConfig
from components.rlhf.config.trainjob import NAMESPACE_VARIABLE, PLAN_VARIABLE, POD_VARIABLE, TrainJobPlan
from components.rlhf.storage.store import open_store
from components.rlhf.trainjob.api import Api
from components.rlhf.trainjob.exchange import deliver
from components.rlhf.trainjob.launch import Task, launch
from tests.support.trainjob_api import LAUNCHER_POD, NAMESPACE, TrainJobApi, running_api

RUN_ID = "0b2d6a3e-9f0c-4b7a-9a59-4a1c8f0e1d2c"
PLAN = TrainJobPlan(
    runtime="rlhf",
    num_nodes=2,
    image="kfp-rlhf/trainer:0.1.0",
    deadline_seconds=3600,
    resources={"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"},
    environment=(
        {"name": "NCCL_DEBUG", "value": "WARN"},
        {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "rlhf-s3", "key": "AWS_ACCESS_KEY_ID"}}},
    ),
    labels={"app.kubernetes.io/part-of": "kfp-rlhf", "kfp-rlhf/stage": "sft", "kfp-rlhf/process-group": "true"},
    pod={"nodeSelector": {"gpu": "h100"}, "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]},
    volume_mounts=({"name": "shm", "mountPath": "/dev/shm"},),
)


@dataclass
class Launch:
    """One call of launch() in a thread, with its log."""

    task: Task
    api: Api
    said: list[str] = field(default_factory=list)
    error: BaseException | None = None
    thread: threading.Thread = field(default_factory=threading.Thread)

    def start(self) -> "Launch":
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        try:
            launch(self.task, self.said.append, api=self.api)
        except BaseException as error:
            self.error = error

    def finish(self, seconds: float = 20) -> "Launch":
        self.thread.join(seconds)
        assert not self.thread.is_alive(), self.said
        return self

    def failed(self, seconds: float = 20) -> str:
        self.finish(seconds)
        assert self.error is not None, self.said
        return str(self.error)

    def succeeded(self, seconds: float = 20) -> None:
        self.finish(seconds)
        if self.error:
            raise self.error

    def until_said(self, text: str, seconds: float = 10) -> None:
        for _ in range(int(seconds * 50)):
            if any(text in line for line in self.said):
                return
            if not self.thread.is_alive() and self.error:
                raise AssertionError(self.said) from self.error
            threading.Event().wait(0.02)
        raise AssertionError((text, self.said))


@dataclass
class World:
    """A server, a shared folder, and a task of the stage sft."""

    api: TrainJobApi
    url: str
    folder: Path
    attempts: int = 0

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def launch(self, **changes: Any) -> Launch:
        """Start an attempt of the task, with outputs and URIs of its own, as after a retry by KFP."""
        self.attempts += 1
        pod = self.folder / f"attempt{self.attempts}"
        uris = {name: f"s3://kfp/{self.attempts}/{name}" for name in ("model", "metrics")}
        artifacts = {name: {"artifacts": [{"name": name, "uri": uri}]} for name, uri in uris.items()}
        outputs = {"artifacts": artifacts, "outputFile": str(pod / "executor_output.json")}
        arguments = dict(
            stage="sft",
            module="components.sft",
            run_id=RUN_ID,
            num_processes=16,
            settings="{}",
            tracking="{}",
            storage=StorageConfig(checkpoint_uri=str(self.shared)).canonical_json(),
            executor_input=json.dumps({"inputs": {}, "outputs": outputs}),
            reads={"base_model": self.folder / "inputs" / "base_model"},
            writes={name: pod / name for name in uris},
        )
        said: list[str] = []
        api = Api(api_client(self.url), NAMESPACE, said.append, pause_seconds=0.02, outage_seconds=20.0)
        return Launch(Task(**(arguments | changes)), api, said).start()

    def deliver(self, files: Mapping[str, str] | None = None) -> None:
        """What the workers of the job do at their end."""
        job = self.api.job
        env = {entry["name"]: entry.get("value") for entry in job["spec"]["trainer"]["env"]}
        args = job["spec"]["trainer"]["args"]
        executor_input = json.loads(args[args.index("--executor-input") + 1])
        model = self.folder / "worker" / "model"
        model.mkdir(parents=True, exist_ok=True)
        for name, text in (files or {"model.safetensors": "weights", "sub/config.json": "{}"}).items():
            (model / name).parent.mkdir(exist_ok=True)
            (model / name).write_text(text)
        manifest = write_manifest(model, kind="sft_model", facts={"loss": 0.5})
        metrics = self.folder / "worker" / "metrics"
        metrics.write_text('{"loss": 0.5}')
        own = {name: entry["artifacts"][0] for name, entry in executor_input["outputs"]["artifacts"].items()}
        metadata: dict[str, dict[str, Any]] = {"model": manifest.metadata(), "metrics": {"loss": 0.5}}
        metadata["model"]["model_uri"] = own["model"]["uri"]
        artifacts = {name: {"artifacts": [{**own[name], "metadata": metadata[name]}]} for name in own}
        output = self.folder / "worker" / "executor_output.json"
        output.write_text(json.dumps({"artifacts": artifacts}))
        parent, _, key = str(env["RLHF_TRAINJOB_OUTPUTS"]).rpartition("/")
        deliver(open_store(parent), key, str(env["RLHF_TRAINJOB_DIGEST"]), {"model": model, "metrics": metrics}, output)


def finish(world: World, name: str) -> None:
    """The job's pods deliver and end, and the job is complete."""
    world.deliver()
    for pod in [p for p in world.api.objects["pods"] if p.startswith(f"{name}-node")]:
        world.api.end_pod(pod, 0)
    world.api.complete(name)


def api_client(url: str) -> client.ApiClient:
    configuration = client.Configuration()
    configuration.host, configuration.retries = url, False
    return client.ApiClient(configuration)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    inputs = tmp_path / "inputs" / "base_model"
    (inputs / "tokenizer").mkdir(parents=True)
    (inputs / "model.safetensors").write_bytes(b"start" * 100)
    (inputs / "tokenizer" / "vocab.txt").write_text("a b c")
    write_manifest(inputs, kind="base_model")
    monkeypatch.setenv(PLAN_VARIABLE, PLAN.canonical_json())
    monkeypatch.setenv(POD_VARIABLE, LAUNCHER_POD)
    monkeypatch.setenv(NAMESPACE_VARIABLE, NAMESPACE)
    with running_api() as (api, url):
        yield World(api, url, tmp_path)
