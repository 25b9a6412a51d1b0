"""Two nodes on this machine: each has its own network, host name, process ids, /tmp and /etc/hosts, and one folder is shared.

A node is a set of Linux namespaces. The two networks are joined by a virtual cable; nothing else can be reached from them.
"""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path("/mnt/shared")  # as the nodes see it
MASTER = "job-node-0-0.job"  # as Kubeflow Trainer names the first pod of a TrainJob with this name
START = """
hostname "$1" && mount --bind "$2" /mnt && mount --bind "/mnt/$1/tmp" /tmp && mount --bind "/mnt/$1/hosts" /etc/hosts
shift 2 && exec "$@"
"""
NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_impossible() -> str:
    """The reason why this machine cannot have such nodes; "" if it can."""
    name = f"probe-{uuid.uuid4().hex[:6]}"
    for command in (["ip", "netns", "add", name], ["ip", "netns", "exec", name, *NAMESPACES, "true"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        if done.returncode:
            return f"{' '.join(command[:3])}: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass
class Node:
    rank: int
    folder: Path  # has a folder per node, and shared/
    network: str  # name of its network namespace
    address: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"node-{self.rank}"

    def popen(self, command: Sequence[str], *, log: IO[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        start = [*NAMESPACES, "sh", "-c", START, "sh", self.name, str(self.folder), *command]
        enter = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "ip",
            "netns",
            "exec",
            self.network,
        ]  # killed with this process, however it ends
        process = subprocess.Popen([*enter, *start], env=dict(env), stdout=log, stderr=log, text=True, cwd=ROOT)
        self.processes.append(process)
        return process

    def lose(self) -> None:
        """Kill every process of the node, as when its power fails."""
        for process in self.processes:
            process.kill()  # the first process of its process ids; the kernel kills the others
            process.wait()


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator["Cluster"]:
    """Two nodes; at the end all their processes are killed and the networks removed, whatever has happened."""
    (folder / "shared").mkdir(parents=True, exist_ok=True)
    suffix = uuid.uuid4().hex[:6]
    nodes = [Node(rank, folder, f"rlhf-{suffix}-{rank}", f"10.97.0.{rank + 1}") for rank in (0, 1)]
    try:
        for node in nodes:
            (folder / node.name / "tmp").mkdir(parents=True, exist_ok=True)
            _ip("netns", "add", node.network)
        cable = [f"v{suffix}{node.rank}" for node in nodes]
        _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for node, end in zip(nodes, cable, strict=True):
            _ip("link", "set", end, "netns", node.network)
            _ip("-n", node.network, "addr", "add", f"{node.address}/24", "dev", end)
            for link in (end, "lo"):
                _ip("-n", node.network, "link", "set", link, "up")
        cluster = Cluster(folder, nodes)
        cluster.publish_name()
        yield cluster
    finally:
        for node in nodes:
            node.lose()
            subprocess.run(["ip", "netns", "del", node.network], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Launched:
    """One command on both nodes."""

    processes: list[subprocess.Popen[str]]
    logs: list[Path]

    def wait(self, timeout: float) -> tuple[int, int]:
        first, second = (process.wait(timeout) for process in self.processes)
        return first, second

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")

    def errors(self, rank: int) -> list[str]:
        return [line for line in self.said(rank).splitlines() if line.startswith("error: ")]


@dataclass
class Cluster:
    folder: Path
    nodes: list[Node]
    port: int = 29500

    @property
    def shared(self) -> Path:
        """The shared folder as this process sees it."""
        return self.folder / "shared"

    def publish_name(self, name: str = MASTER) -> None:
        """Make node rank 0's name resolve on both nodes. A file that is mounted must be written in place."""
        for node in self.nodes:
            own = f"127.0.0.1 localhost\n{node.address} {node.name}\n"
            (self.folder / node.name / "hosts").write_text(own + f"{self.nodes[0].address} {name}\n")

    def hide_name(self) -> None:
        self.publish_name("not-yet")

    def launch(
        self, module: str, arguments: Sequence[str], label: str, *, env: Sequence[Mapping[str, str]] = ({}, {})
    ) -> Launched:
        """Start `python -m MODULE` on both nodes with the variables that Kubeflow Trainer sets, and env by node."""
        processes, logs = [], []
        for node in self.nodes:
            job = {
                "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": str(node.rank),
                "PET_MASTER_ADDR": MASTER, "PET_MASTER_PORT": str(self.port),
            }  # fmt: skip
            variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | job | env[node.rank]
            logs.append(self.folder / f"{label}-{node.rank}.log")
            with logs[-1].open("w") as log:
                processes.append(node.popen([sys.executable, "-m", module, *arguments], log=log, env=variables))
        return Launched(processes, logs)
