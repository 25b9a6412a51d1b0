"""The bucket script and the MLflow server of the manifests, with real servers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.overlays import ROOT, of_kind

BIN = Path(sys.executable).parent
SCRIPT = ROOT / "manifests" / "components" / "seaweedfs" / "services" / "bucket.py"
KEYS = {
    "AWS_ACCESS_KEY_ID": "rlhf",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[object], folder: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=folder, env=os.environ | env, stdout=log, stderr=log
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def make_bucket(port: int, wait_s: float, secret: str = "test-secret") -> subprocess.CompletedProcess[str]:
    env = KEYS | {"AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}", "BUCKET": "rlhf"}
    env |= {"WAIT_S": str(wait_s), "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_bucket_script_is_idempotent(tmp_path: Path) -> None:
    """SeaweedFS runs with the arguments of the StatefulSet, except for ports and folders."""
    (store,) = [s for s in of_kind("kind", "StatefulSet") if s["metadata"]["name"] == "s3"]
    (container,) = store["spec"]["template"]["spec"]["containers"]
    config = json.loads((ROOT / "manifests/overlays/kind/secrets/identities.json.example").read_text())
    config["identities"][0]["credentials"][0]["secretKey"] = "test-secret"
    (tmp_path / "identities.json").write_text(json.dumps(config))
    (tmp_path / "data").mkdir()
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    args = [*container["args"], *(f"-{name}.port={port}" for name, port in ports.items() if name != "s3")]
    args += [f"-{name}.port.grpc={free_port()}" for name in ports]
    replacements = {"/data": str(tmp_path / "data"), "/etc/s3": str(tmp_path), "0.0.0.0": "127.0.0.1"}
    for old, new in replacements.items():
        args = [arg.replace(old, new) for arg in args]
    args = [arg.replace("s3.port=8333", f"s3.port={ports['s3']}") for arg in args]
    with running([BIN / "weed", *args], tmp_path):
        first = make_bucket(ports["s3"], 120)
        assert first.returncode == 0, first.stderr + (tmp_path / "log.txt").read_text()[-2000:]
        assert make_bucket(ports["s3"], 30).returncode == 0
        wrong = make_bucket(ports["s3"], 0, secret="another")
        assert wrong.returncode == 1 and "bucket rlhf could not be created in time" in wrong.stderr


def test_unreachable_store_is_one_sentence() -> None:
    run = make_bucket(free_port(), 0)
    assert run.returncode == 1
    assert run.stderr.startswith("bucket rlhf could not be created in time; last error: ")
    assert len(run.stderr.strip().splitlines()) == 1


def status_of(port: int, path: str, host: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_mlflow_accepts_only_its_own_host_names(tmp_path: Path) -> None:
    (server,) = of_kind("kind", "Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    port = free_port()
    env = {item["name"]: item["value"] for item in container["env"] if "value" in item} | KEYS | {"HOME": str(tmp_path)}
    env |= {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://rlhf/mlflow",
    }
    replacements = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}", "--workers=2": "--workers=1"}
    command = [replacements.get(part, part) for part in container["command"]]
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    with running([BIN / command[0], *command[1:]], tmp_path, **env):
        end = time.monotonic() + 240
        while status_of(port, "/health", "10.1.2.3:5000") != 200:  # the kubelet uses the pod's address
            assert time.monotonic() < end, (tmp_path / "log.txt").read_text()[-2000:]
            time.sleep(1)
        (tracking,) = (ROOT / "manifests/overlays/kind/secrets/rlhf-mlflow.env.example").read_text().split()
        assert status_of(port, path, tracking.partition("://")[2]) == 200
        assert status_of(port, path, "localhost:5000") == 200
        assert status_of(port, path, "evil.example.com") == 403
        with urllib.request.urlopen(f"http://localhost:{port}{path}") as response:
            assert json.load(response)["experiment"]["artifact_location"].startswith("mlflow-artifacts:/")
