"""Plays the controllers and the kubelets for a TrainJob on this machine: each pod is a process with the variables of Trainer's torch
plugin (pkg/runtime/framework/plugins/torch of Kubeflow Trainer 2.3), its own temporary folder, and a log on the server.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.seaweed import free_port
from tests.support.trainjob_api import TrainJobApi

ROOT = Path(__file__).resolve().parents[2]


class Kubelet:
    """Runs the pods of one job after the other. secrets are the contents of Secrets, by name and key."""

    def __init__(self, api: TrainJobApi, folder: Path, secrets: Mapping[str, Mapping[str, str]]) -> None:
        self.api, self.folder, self.secrets = api, folder, secrets
        self.processes: list[subprocess.Popen[str]] = []
        self.num_runs = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.api.closed = True
        for process in self.processes:
            process.kill()
            process.wait()

    def _run(self) -> None:
        seen: set[str] = set()
        while not self.api.closed:
            with self.api.changed:
                new = [job for job in self.api.objects["trainjobs"].values() if job["metadata"]["uid"] not in seen]
                if not new:
                    self.api.changed.wait(0.2)
                    continue
            seen.add(new[0]["metadata"]["uid"])
            self._run_job(new[0])

    def _run_job(self, job: dict[str, Any]) -> None:
        name, num = job["metadata"]["name"], job["spec"]["trainer"]["numNodes"]
        self.num_runs += 1
        pods = self.api.run_pods(name, num)
        port = free_port()
        self.processes = [self._start(job, pod, rank, port) for rank, pod in enumerate(pods)]
        readers = [
            threading.Thread(target=self._read, args=(pod, process), daemon=True)
            for pod, process in zip(pods, self.processes, strict=True)
        ]
        for reader in readers:
            reader.start()
        pause = threading.Event()
        while any(process.poll() is None for process in self.processes):
            failed = any(process.poll() for process in self.processes)
            if failed or name not in self.api.objects["trainjobs"]:  # deleted
                for process in self.processes:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)
                        try:
                            process.wait(30)
                        except subprocess.TimeoutExpired:
                            process.kill()
            pause.wait(0.1)
        for reader in readers:
            reader.join(10)
        for pod, process in zip(pods, self.processes, strict=True):
            if pod in self.api.objects["pods"]:
                errors = [text for _, text in self.api.logs[pod] if text.startswith("error: ")]
                self.api.end_pod(pod, process.returncode % 256, message=errors[0] if errors else "")
        if name in self.api.objects["trainjobs"]:
            finish = self.api.fail if any(process.returncode for process in self.processes) else self.api.complete
            finish(name)

    def _start(self, job: dict[str, Any], pod: str, rank: int, port: int) -> subprocess.Popen[str]:
        trainer = job["spec"]["trainer"]
        scratch = self.folder / pod
        scratch.mkdir(parents=True)
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "OMP_NUM_THREADS") if key in os.environ}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "RLHF_PROGRESS_SECONDS": "0"}
        for entry in trainer["env"]:
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            value = self.secrets.get(reference["name"], {}).get(reference["key"]) if reference else entry["value"]
            if value is not None:
                environment[entry["name"]] = value
        environment |= {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        command = [part.replace("$$(", "$(") for part in (*trainer["command"], *trainer["args"])]
        return subprocess.Popen(
            [sys.executable, *command[1:]], cwd=scratch, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _read(self, pod: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self.api.say(pod, line.rstrip("\n"))
