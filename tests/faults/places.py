"""Places of disturbed runs: a folder; a folder with checkpoints in S3 and metrics in MLflow; a small disk."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml
from mlflow import MlflowClient

from tests.support.fault_proxy import FaultProxy
from tests.support.resident import Resident, ResidentProcess
from tests.support.seaweed import BUCKET, SeaweedFS, bare_client, credentials, free_port

Curves = dict[str, dict[str, list[int]]]  # stage -> metric -> steps


class FolderPlace:
    """Everything is in the run directory, and nothing is tracked."""

    runs_at_once = 1000

    def __init__(self, folder: Path, params: Path, resident: Resident | None) -> None:
        """Programs start as forks of resident where it is given."""
        self.folder, self.params, self.resident = folder, params, resident
        self.environment = dict(os.environ)

    def start(self, command: list[str], log: IO[str]) -> subprocess.Popen[bytes] | ResidentProcess:
        """Start a program that leads a session and writes to log."""
        if self.resident:
            return self.resident.popen(command, stdout=log, stderr=log, env=self.environment)
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=self.environment
        )

    def params_of(self, run: Path) -> Path:
        return self.params

    def steps(self, run: Path) -> list[str]:
        """Names of all checkpoints, complete or not."""
        return [path.name for path in run.glob("checkpoints/run-*/*/*/step-*") if path.is_dir()]

    def curves(self, run: Path) -> Curves | None:
        """The steps of every metric of the run in MLflow; None if nothing is tracked."""
        return None

    def close(self) -> None:
        return


class SmallDisk(FolderPlace):
    """A tmpfs that can be shrunk to the size of its content."""

    runs_at_once = 1

    def __init__(self, folder: Path, params: Path, resident: Resident | None) -> None:
        folder.mkdir()
        super().__init__(folder, params, resident)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", str(folder)], check=True, capture_output=True)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        used = shutil.disk_usage(self.folder).used
        self._resize(f"{used // 1024 + 4}k")
        try:
            yield
        finally:
            self._resize("4g")

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)


class Services(FolderPlace):
    """A real S3 server and a real MLflow server, each behind a proxy that can be cut off."""

    runs_at_once = 1

    def __init__(self, folder: Path, params: Path, resident: Resident | None) -> None:
        folder.mkdir()
        super().__init__(folder, params, resident)
        self.environment |= credentials() | {"PYTHONWARNINGS": "ignore"}
        self.is_away = {"s3": False, "mlflow": False}
        self.catch_upload = False
        self.seaweed = SeaweedFS(folder / "seaweed")
        self.seaweed.start()
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            f"{folder}/files",
        ]
        self.mlflow = subprocess.Popen(
            command, stdout=(folder / "mlflow.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )
        self.mlflow_uri = f"http://127.0.0.1:{port}"
        _wait_for(f"{self.mlflow_uri}/health", self.mlflow)
        self.s3_proxy = FaultProxy(self.seaweed.port, self._s3_fault)
        self.mlflow_proxy = FaultProxy(port, lambda number, line: "away" if self.is_away["mlflow"] else None)

    def params_of(self, run: Path) -> Path:
        params: dict[str, Any] = yaml.safe_load(self.params.read_text())
        params["tracking"] = {"uri": self.mlflow_proxy.url}
        params["storage"] = {
            "checkpoint_uri": f"s3://{BUCKET}/{run.name}",
            "endpoint_url": self.s3_proxy.url,
            "region": "us-east-1",
        }
        path = self.folder / f"{run.name}.yaml"
        path.write_text(yaml.safe_dump(params))
        return path

    def steps(self, run: Path) -> list[str]:
        pages = bare_client(self.seaweed.url).get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=f"{run.name}/").search("Contents[].Key")
        return sorted({part for key in found if key for part in key.split("/") if part.startswith("step-")})

    def curves(self, run: Path) -> Curves | None:
        return curves_of(self.mlflow_uri, run.name)

    @contextlib.contextmanager
    def away(self, name: str) -> Iterator[None]:
        self.is_away[name] = True
        try:
            yield
        finally:
            self.is_away[name] = False

    def close(self) -> None:
        os.killpg(self.mlflow.pid, signal.SIGKILL)  # with the workers that it started
        self.mlflow.wait()
        self.seaweed.kill()

    def _s3_fault(self, number: int, line: str) -> str | None:
        if self.catch_upload and line.startswith("PUT") and "/step-" in line:
            self.catch_upload = False
            return "lost"
        return "away" if self.is_away["s3"] else None


def curves_of(uri: str, run_name: str) -> Curves:
    """Of the runs that are nested in the parent of that name (run id: name, dash, random)."""
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "kfp-rlhf"]
    curves: Curves = {}
    for found in client.search_runs([experiment.experiment_id], max_results=1000):
        parent, _, stage = found.data.tags["rlhf.run_id"].partition("/")
        if stage and parent.rpartition("-")[0] == run_name:
            points = {
                name: [p.step for p in client.get_metric_history(found.info.run_id, name)]
                for name in found.data.metrics
                if not name.startswith("system/")  # taken every few seconds
            }
            for name, steps in points.items():
                curves.setdefault(stage, {}).setdefault(name, []).extend(steps)
    return {stage: {name: sorted(steps) for name, steps in metrics.items()} for stage, metrics in curves.items()}


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.3)
