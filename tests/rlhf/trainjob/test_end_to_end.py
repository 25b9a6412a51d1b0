"""Stages on two nodes, from the task of the pipeline to its outputs: the task is the real program with the plan of a compiled params
file, the server speaks the Kubernetes API, and each pod is the real program as a process of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.config.judge import EndpointJudge
from components.rlhf.config.trainjob import NAMESPACE_VARIABLE, PLAN_VARIABLE, POD_VARIABLE
from pipelines.settings import load_params
from pipelines.trainjob import plan_of
from tests.support.judge_server import JudgeServer, prefers
from tests.support.seaweed import BUCKET, SeaweedFS, credentials
from tests.support.trainjob_api import LAUNCHER_POD, NAMESPACE, TrainJobApi, running_api
from tests.support.trainjob_kubelet import Kubelet

pytest.importorskip("components.rlhf.runtime.nodes", reason="stages of this version run on one node")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
RUN_ID = "5f0e2c9a-0000-4000-8000-000000000001"
OVERRIDES = ["cluster.launcher=trainjob", "cluster.profiles={cpu: {num_nodes: 1}, two: {like: cpu, num_nodes: 2}}",
             "cluster.stages={sft: two, ppo: two, evaluation: two}", "cluster.secrets.mlflow=null"]  # fmt: skip


@dataclass
class Cluster:
    api: TrainJobApi
    kubelet: Kubelet
    folder: Path
    checkpoints: str
    kubeconfig: Path

    def start_task(self, stage: str, settings: str, attempt: str, *overrides: str) -> subprocess.Popen[str]:
        """The program of a stage as KFP runs it in the pod of a task."""
        from tests.support.node_inputs import INPUTS, OUTPUTS, PARAMETERS

        params = load_params(
            ROOT / "pipelines/params/tiny.yaml",
            [*OVERRIDES, f"storage.checkpoint_uri={self.checkpoints}", *overrides],
        )
        outputs = self.folder / attempt
        artifacts = {
            name: {"artifacts": [{"name": name, "uri": f"s3://kfp/{attempt}/{name}"}]} for name in OUTPUTS[stage]
        }
        executor_input = {"inputs": {}, "outputs": {"artifacts": artifacts, "outputFile": str(outputs / "output.json")}}
        paths = {name: self.folder / "inputs" / name for name in INPUTS[stage]}
        paths |= {name: outputs / name for name in (*OUTPUTS[stage], *PARAMETERS.get(stage, ()))}
        storage = params.storage.model_copy(update={"endpoint_url": self.kubelet.secrets.get("url", {}).get("url")})
        command = [
            sys.executable,
            "-m",
            f"components.{stage}",
            "--settings",
            settings,
            "--tracking",
            '{"enabled": false}',
        ]
        command += ["--storage", storage.canonical_json(), "--executor-input", json.dumps(executor_input)]
        command += [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]
        environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ} | credentials()
        environment |= {"PYTHONPATH": str(ROOT), "KUBECONFIG": str(self.kubeconfig), "RLHF_RUN_ID": RUN_ID,
                        PLAN_VARIABLE: plan_of(params, stage).canonical_json(),
                        POD_VARIABLE: LAUNCHER_POD, NAMESPACE_VARIABLE: NAMESPACE}  # fmt: skip
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    from tests.support.node_inputs import write_inputs

    write_inputs(tmp_path / "inputs")
    secrets: dict[str, dict[str, str]] = {"rlhf-s3": credentials()}
    server = SeaweedFS(tmp_path / "s3") if request.param == "s3" else None
    if server:
        server.start()
        secrets["url"] = {"url": server.url}
    with running_api() as (api, url):
        kubeconfig = tmp_path / "kubeconfig"
        named: dict[str, Any] = {"clusters": [{"name": "x", "cluster": {"server": url}}],
                                 "users": [{"name": "x", "user": {}}],
                                 "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}]}  # fmt: skip
        kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "x", **named}))
        kubelet = Kubelet(api, tmp_path / "nodes", secrets)
        try:
            uri = f"s3://{BUCKET}/checkpoints" if server else str(tmp_path / "volume")
            yield Cluster(api, kubelet, tmp_path, uri, kubeconfig)
        finally:
            kubelet.close()
            if server:
                server.kill()


@pytest.mark.parametrize("cluster", ["s3"], indirect=True)
def test_ppo_on_two_nodes_with_inputs_and_outputs_in_s3(cluster: Cluster) -> None:
    """The nodes share nothing but the bucket."""
    from tests.support.node_inputs import OUTPUTS, ppo_settings

    task = cluster.start_task("ppo", ppo_settings(2), "first")
    output = task.communicate(timeout=240)[0]
    assert task.returncode == 0, output
    assert "node 0: [ppo] " in output and "node 1: " not in output
    outputs = cluster.folder / "first"
    model = open_artifact(outputs / "model", "policy_model")
    artifacts = json.loads((outputs / "output.json").read_text())["artifacts"]
    assert set(artifacts) == set(OUTPUTS["ppo"])
    assert artifacts["manifest"]["artifacts"][0]["metadata"]["model_uri"] == "s3://kfp/first/model"
    assert artifacts["manifest"]["artifacts"][0]["metadata"]["digest"] == model.digest
    assert json.loads((outputs / "metrics").read_text()) == artifacts["metrics"]["artifacts"][0]["metadata"]
    assert (outputs / "curves").read_text().lstrip().startswith("<!")


@pytest.mark.parametrize("cluster", ["volume"], indirect=True)
def test_evaluation_on_two_nodes_asks_the_endpoint_and_delivers_its_decision(cluster: Cluster, tmp_path: Path) -> None:
    """The API key is only in the pods; decision and reason are files of the task, from which KFP reads parameters."""
    from tests.support.node_inputs import OUTPUTS, evaluation_settings, write_evaluation_inputs

    with JudgeServer(prefers(len), key="secret") as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "m", "api_key_variable": "JUDGE_KEY"}
        config = EndpointJudge.model_validate(judge)
        shutil.rmtree(tmp_path / "inputs")
        write_evaluation_inputs(tmp_path / "inputs", config)
        cluster.kubelet.secrets = {"rlhf-judge": {"JUDGE_KEY": "secret"}}
        task = cluster.start_task("evaluation", evaluation_settings(2, config), "first", f"judge={json.dumps(judge)}")
        output = task.communicate(timeout=120)[0]
        assert task.returncode == 0, output
        outputs = cluster.folder / "first"
        found = open_artifact(outputs / "evaluation", "evaluation")
        assert (outputs / "decision").read_text() == found.facts["decision"] in ("promote", "reject")
        assert (outputs / "reason").read_text() == found.facts["reason"]
        questions = [json.dumps(request, sort_keys=True) for request in server.requests]
        assert len(set(questions)) == len(questions) > found.facts["num_compared"] == 40, (
            "one node asks, each question once"
        )
    artifacts = json.loads((outputs / "output.json").read_text())["artifacts"]
    assert set(artifacts) == set(OUTPUTS["evaluation"])
    assert artifacts["evaluation"]["artifacts"][0]["metadata"]["digest"] == found.digest
    assert (outputs / "report").read_text().lstrip().startswith("<!")
    assert not (tmp_path / "volume" / f"run-{RUN_ID}").exists(), "no later stage needs what was exchanged"


@pytest.mark.parametrize("cluster", ["volume"], indirect=True)
def test_sft_on_two_nodes_survives_a_lost_node_and_a_lost_task(cluster: Cluster) -> None:
    """A node is killed after a checkpoint, so that the task fails. Its second attempt is killed too; the third takes over the job, which
    has resumed from the checkpoint, and delivers what KFP expects of a task.
    """
    from tests.support.node_inputs import sft_settings

    content = json.loads(sft_settings(2))
    content["sft"]["max_steps"] = 12  # enough for a checkpoint before the node is lost
    settings = json.dumps(content)
    first = cluster.start_task("sft", settings, "first")
    assert first.stdout
    for line in first.stdout:
        if line.startswith("node 0: [sft] step 4/"):
            break
    os.killpg(cluster.kubelet.processes[1].pid, signal.SIGKILL)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 1 and "failed: node " in output, output
    second = cluster.start_task("sft", settings, "second")
    assert second.stdout
    for line in second.stdout:
        if "created TrainJob" in line:
            break
    second.kill()
    second.wait()
    third = cluster.start_task("sft", settings, "third")
    output = third.communicate(timeout=180)[0]
    assert third.returncode == 0, output
    assert "found TrainJob" in output and "resum" in output, output
    assert cluster.kubelet.num_runs == 2
    model = open_artifact(cluster.folder / "third" / "model", "sft_model")
    assert str(model.facts["training_engine"]).endswith(", 2 processes")
    artifacts = json.loads((cluster.folder / "third" / "output.json").read_text())["artifacts"]
    assert artifacts["model"]["artifacts"][0]["uri"] == "s3://kfp/third/model"
    assert artifacts["model"]["artifacts"][0]["metadata"]["digest"] == model.digest
    assert artifacts["metrics"]["artifacts"][0]["metadata"] == json.loads(
        (cluster.folder / "third" / "metrics").read_text()
    )
    assert (cluster.folder / "third" / "summary").read_text().startswith("#")
