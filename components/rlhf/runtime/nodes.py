"""The processes of a stage on this node, and the nodes of a job in which this container is one of several."""

import contextlib
import fcntl
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from components.rlhf.config.processes import Processes
from components.rlhf.text.errors import InputError

DEFAULT_PORT = 29500
SIOCGIFADDR = 0x8915  # sys/ioctl.h of Linux: the IPv4 address of an interface
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
# When the launcher of several processes started, by the monotonic clock, which all processes of a machine share.
STARTED = "RLHF_STARTED"


@dataclass(frozen=True, kw_only=True)
class Nodes:
    number: int
    rank: int  # of this node
    address: str  # host name or address of node rank 0, which may resolve some time later
    port: int


def launch_processes(stage: str, processes: Processes) -> None:
    """Unless this is one of them, launch the processes of a stage on this node, and exit with their exit code."""
    if "WORLD_SIZE" in os.environ:
        return
    os.environ[STARTED] = str(time.monotonic())
    if nodes := nodes_of_job():
        num_local = processes_per_node(stage, processes, nodes)
        from components.rlhf.runtime.launcher import launch_on_node  # imports torch

        sys.exit(launch_on_node(nodes, num_local, timeout_minutes=processes.timeout_minutes))
    if processes.number > 1:
        from components.rlhf.runtime.launcher import launch

        sys.exit(launch(processes.number))


def nodes_of_job() -> Nodes | None:
    """The nodes according to torchrun's variables PET_*; None for a single node. Raises InputError for invalid variables.

    Kubeflow Trainer v2 sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR (a name of a headless service) and PET_MASTER_PORT in each pod
    of a TrainJob (pkg/runtime/framework/plugins/torch/torch.go). Its PET_NPROC_PER_NODE ("auto", "cpu", "gpu" or a number, which may
    be that of the CPUs) is not used: num_processes of the settings says how many processes there are.
    """
    number = _integer("PET_NNODES", "1")
    if number == 1:
        return None
    rank = _integer("PET_NODE_RANK", "")
    if number < 1 or not 0 <= rank < number:
        raise InputError(
            f"PET_NODE_RANK is {rank} and PET_NNODES is {number}; node ranks are 0 to PET_NNODES - 1, one for each node."
        )
    address = os.environ.get("PET_MASTER_ADDR", "")
    if not address:
        raise InputError(f"PET_NNODES is {number}, but PET_MASTER_ADDR is missing; set it to the host of node rank 0.")
    return Nodes(number=number, rank=rank, address=address, port=_integer("PET_MASTER_PORT", str(DEFAULT_PORT)))


def processes_per_node(stage: str, processes: Processes, nodes: Nodes) -> int:
    """The equal share of the processes of a stage.

    Raises InputError if the nodes cannot share the processes, the stage runs in one process, or a vLLM engine would span nodes.
    """
    if processes.number == 1:
        raise InputError(f"{stage} runs in one process, and PET_NNODES is {nodes.number}; start it on one node.")
    if processes.number % nodes.number:
        raise InputError(
            f"{processes.key} is {processes.number}, which {nodes.number} nodes (PET_NNODES) cannot share equally; "
            "it counts the processes of all nodes: choose a multiple of their number."
        )
    num_local = processes.number // nodes.number
    if num_local % processes.ranks_per_engine:
        raise InputError(
            f"rollout.vllm.tensor_parallel_size of {stage} is {processes.ranks_per_engine}, but must divide the {num_local} processes of "
            "each node: the ranks that share an engine are on one node; lower it."
        )
    return num_local


def choose_interface(nodes: Nodes) -> None:
    """Tell gloo which interface leads to the other nodes, unless GLOO_SOCKET_IFNAME does. The address of node rank 0 must resolve.

    By default gloo takes the one of the host's name, which may be the loopback interface. NCCL chooses well by itself, among all
    interfaces, so NCCL_SOCKET_IFNAME is left alone.
    """
    if GLOO_INTERFACE not in os.environ and (name := _interface_to(nodes.address, nodes.port)):
        os.environ[GLOO_INTERFACE] = name


def _interface_to(host: str, port: int) -> str | None:
    """The interface from which packets to a host are sent, of node rank 0 itself the one that has the address."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect(address)
        own = probe.getsockname()[0].partition("%")[0]
    for _, name in socket.if_nameindex():
        if own in _addresses(name):
            return name
    return None


def _addresses(interface: str) -> list[str]:
    found = []
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        contextlib.suppress(OSError),
    ):  # it has no IPv4 address
        reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        found.append(socket.inet_ntoa(reply[20:24]))
    table = Path("/proc/net/if_inet6")
    lines = table.read_text(encoding="ascii").splitlines() if table.is_file() else []
    for fields in map(str.split, lines):
        if fields[-1] == interface:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[0])))
    return found


def _integer(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}; set it to a number.")
    return int(text)
