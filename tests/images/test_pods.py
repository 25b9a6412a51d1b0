"""The whole DAG in the built images, each task as its pod would run: the user and the volumes of the compiled pipeline, a read-only root,
KFP's folders, URIs and executor input, and no network but to an S3 and an MLflow server."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.config.params import Params
from pipelines.placement import role_of_image
from tests.support.compiled_pipelines import CompiledPipeline
from tests.support.launcher import Platform, TaskResult
from tests.support.pod_runs import run_dag
from tests.support.podman import missing, podman
from tests.support.seaweed import ACCESS_KEY, SECRET_KEY, weed
from tests.support.tiny_model import make_tiny_model
from tests.support.toy_pipeline import toy_params, write_data

pytestmark = [
    pytest.mark.containers,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"NO IMAGE WAS BUILT OR RUN: {missing()}"),
]
SERVERS = """
/weed server -dir=/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -s3 -s3.port=8333 -s3.config=/data/identities.json -volume.max=50 \
    -master.volumeSizeLimitMB=1024 -s3.port.iceberg=0 -s3.port.lance=0 >/data/weed.log 2>&1 &
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false exec mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
    --backend-store-uri sqlite:////data/mlflow.db --artifacts-destination /data/artifacts >/data/mlflow.log 2>&1
"""
IN_SERVERS = """
import sys, time, urllib.request, boto3
from botocore.config import Config
s3 = boto3.client("s3", endpoint_url="http://127.0.0.1:8333", region_name="us-east-1", config=Config(s3={"addressing_style": "path"}))
deadline = time.monotonic() + 240
while True:
    try:
        urllib.request.urlopen("http://127.0.0.1:5000/health", timeout=5)
        s3.create_bucket(Bucket="rlhf")
        break
    except Exception as error:
        if "BucketAlready" in str(error):
            break
        if time.monotonic() > deadline:
            sys.exit(repr(error))
        time.sleep(1)
"""
LIST = """
import boto3
from botocore.config import Config
s3 = boto3.client("s3", endpoint_url="http://127.0.0.1:8333", region_name="us-east-1", config=Config(s3={"addressing_style": "path"}))
for page in s3.get_paginator("list_objects_v2").paginate(Bucket="rlhf"):
    for entry in page.get("Contents", []):
        print(entry["Key"])
"""
TRACKED = """
import json
from mlflow import MlflowClient
client = MlflowClient("http://127.0.0.1:5000")
runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
(parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
(version,) = client.search_model_versions("name = 'kfp-rlhf'")
print(json.dumps({
    "status": parent.info.status, "metrics": sorted(parent.data.metrics),
    "files": sorted(f.path for f in client.list_artifacts(parent.info.run_id)),
    "stages": {r.data.tags["rlhf.stage"]: r.info.status for r in runs if "mlflow.parentRunId" in r.data.tags},
    "weights": version.tags["weights"], "decision": version.tags["decision"],
}))
"""


@pytest.fixture(scope="module")
def images(trainer: str, tools: str, rollout: str) -> dict[str, str]:
    """The images by role."""
    return {"trainer": trainer, "tools": tools, "rollout": rollout}


@pytest.fixture(scope="module")
def servers(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a container with an S3 and an MLflow server, whose network has nothing else."""
    data, name = tmp_path_factory.mktemp("servers"), f"rlhf-servers-{uuid.uuid4().hex[:8]}"
    data.chmod(0o777)
    identity = {
        "name": "rlhf",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (data / "identities.json").write_text(json.dumps({"identities": [identity]}))
    volumes = (f"--volume={weed()}:/weed:ro", f"--volume={data}:/data")
    podman("run", "--detach", f"--name={name}", "--network=none", *volumes, images["trainer"], "sh", "-c", SERVERS)
    try:
        in_servers(name, IN_SERVERS)
        yield name
    finally:
        podman("rm", "--force", "--time=0", name, check=False)


def in_servers(name: str, script: str) -> str:
    keys = (f"--env=AWS_ACCESS_KEY_ID={ACCESS_KEY}", f"--env=AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
    return podman("exec", *keys, name, "python", "-c", script).stdout


def platform(folder: Path, images: dict[str, str], servers: str, **sections: Any) -> Platform:
    data = folder / "data"
    data.mkdir()
    make_tiny_model(data / "model", seed=0, hidden_size=128)  # the smallest heads that vLLM has on CPUs
    write_data(data)
    for path in [folder, data, *data.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    on_claim = {name: Path(f"/data/{name}.jsonl") for name in ("demonstrations", "preferences", "prompts")}
    params = toy_params(
        Path("/data/model"),
        on_claim,
        cluster={"claims": {"/data": "team-data"}},
        storage={"uri": "s3://rlhf", "retry_minutes": 0.5},
        checkpoint={"every_minutes": 0.0},
        **sections,
    )
    params["ppo"]["rollout"]["engine"] = "vllm"
    checked = Params.model_validate(params)
    compiled = CompiledPipeline(checked, folder / "compiled")
    by_stage = {
        task: images[role_of_image(checked, task.removesuffix("-2").replace("-", "_"))] for task in compiled.pods
    }
    secrets = {
        "rlhf-s3": {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:8333",
            "AWS_REGION": "us-east-1",
        },
        "rlhf-mlflow": {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"},
    }
    run_id = str(uuid.uuid4())
    return Platform(compiled, folder, run_id, by_stage, f"container:{servers}", secrets, {"team-data": data})


@pytest.fixture(scope="module")
def run(
    images: dict[str, str], servers: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Platform, dict[str, TaskResult]]:
    pods = platform(tmp_path_factory.mktemp("pods"), images, servers)
    return pods, run_dag(pods)


def test_every_task_succeeds_as_a_pod(run: tuple[Platform, dict[str, TaskResult]]) -> None:
    """Through to gate, register and notify; PPO samples with vLLM."""
    _, results = run
    assert {task: (result.exit_code, result.log[-3000:]) for task, result in results.items() if result.exit_code} == {}
    expected = {"import-model", "prepare-data", "sft", "reward-model", "judge", "ppo", "evaluation", "notify"}
    assert expected < set(results) and len(set(results) & {"register", "register-2"}) == 1
    assert "vllm" in str(results["ppo"].artifacts["model"].metadata["rollout_engine"])
    assert all(result.termination_message == "" for result in results.values())


def test_checkpoints_are_gone_and_models_are_published(
    run: tuple[Platform, dict[str, TaskResult]], servers: str
) -> None:
    pods, _ = run
    keys = in_servers(servers, LIST).split()
    published = {key.rpartition("/")[0] for key in keys if key.endswith("/manifest.json")}
    assert published == {f"models/{pods.run_id}/{stage}/model" for stage in ("sft", "reward_model", "ppo")}
    assert [key for key in keys if key.startswith("checkpoints/")] == []
    storage = json.loads(pods.compiled.spec["root"]["inputDefinitions"]["parameters"]["storage"]["defaultValue"])
    assert storage["checkpoint_uri"] == "s3://rlhf/checkpoints"  # where the stages have written them


def test_mlflow_has_the_run_its_reports_and_the_published_model(
    run: tuple[Platform, dict[str, TaskResult]], servers: str
) -> None:
    pods, results = run
    tracked = json.loads(in_servers(servers, TRACKED).splitlines()[-1])
    assert tracked["status"] == "FINISHED" and set(tracked["stages"].values()) == {"FINISHED"}
    assert {"win_rate", "kl", "judge/heldout_accuracy", "sft/heldout_loss"} <= set(tracked["metrics"])
    assert {"params.yaml", "summary.json", "report.html"} <= set(tracked["files"])
    assert tracked["weights"] == f"s3://rlhf/models/{pods.run_id}/ppo/model"
    assert tracked["decision"] == results["evaluation"].parameters["decision"].strip()


def test_register_and_judge_download_no_weights(run: tuple[Platform, dict[str, TaskResult]]) -> None:
    pods, results = run
    for stage, output in (("ppo", "manifest"), ("import-model", "tokenizer")):
        folder = pods.stored(results[stage].artifacts[output].uri)
        assert not [path for path in folder.rglob("*") if path.suffix == ".safetensors"]


def test_failed_task_shows_one_sentence_where_uis_show_it(images: dict[str, str], servers: str, tmp_path: Path) -> None:
    pods = platform(tmp_path, images, servers)
    (tmp_path / "data/prompts.jsonl").write_text('{"prompt": 5}\n')
    results = run_dag(pods)
    failed = results["prepare-data"]
    assert failed.exit_code == 1 and "Traceback" not in failed.log
    assert failed.termination_message.startswith("error: ") and "prompts.jsonl:1" in failed.termination_message
    assert results["notify"].exit_code == 0
    said = results["notify"].log
    assert "failed in prepare_data" in said and "prompts.jsonl:1" in said
    assert set(results) == {"import-model", "prepare-data", "notify"}
