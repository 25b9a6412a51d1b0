"""What vLLM needs of the process that it runs in, and what it changes there."""

import contextlib
import os
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from components.rlhf.text.errors import InputError


def configure_environment() -> None:
    """Set vLLM's environment variables. A value set by the user takes precedence where setdefault is used."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # run the engine in this process, so that weights need no transfer
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_gib
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads use the same cores
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local folders
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # 18 s of compilation before the first token
        # vLLM uses AMX in bf16 where the processor has it, but does not ask Linux for it, which then ends the process (SIGILL).
        torch.cpu._init_amx()


def check_processes(tensor_parallel_size: int) -> None:
    """Raise InputError unless the ranks of the process group can share engines of this size."""
    is_initialized = torch.distributed.is_initialized()
    world_size = torch.distributed.get_world_size() if is_initialized else 1
    if not is_initialized and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "torch.distributed must be initialized before the vLLM engine is created, because it uses the process group"
        )
    if world_size % tensor_parallel_size:
        raise InputError(
            f"ppo.rollout.vllm.tensor_parallel_size is {tensor_parallel_size}, but must divide the {world_size} training "
            "processes (ppo.training.num_processes); change one of them."
        )
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if on_node < world_size and on_node % tensor_parallel_size:
        raise InputError(
            f"ppo.rollout.vllm.tensor_parallel_size is {tensor_parallel_size}, but must divide the {on_node} processes of each node: the "
            "ranks that share an engine are on one node; lower it."
        )


@contextlib.contextmanager
def own_shared_memory() -> Iterator[None]:
    """While an engine starts on a CPU, name the memory through which its ranks exchange tensors, and forget the name afterwards.

    vLLM 0.32 names it after the ranks alone and leaves it behind, so that the next engine finds the name taken. Called by every rank.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    identifiers = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(identifiers, src=0)

    def name_of(communicator: Any) -> str:
        return f"{identifiers[0]}-{communicator.unique_name}-{'-'.join(map(str, communicator.ranks))}"

    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(name_of)
    try:
        yield
    finally:
        for path in Path("/dev/shm").glob(f"{identifiers[0]}-*"):  # every rank has mapped it by now
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """Undo what vLLM changes: it seeds and uses the global generators, and on a CPU disables torch.set_num_threads.

    There it also sets torchrun's LOCAL_WORLD_SIZE to the number of ranks that share the engine.
    """
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
    set_num_threads, num_threads, state = torch.set_num_threads, torch.get_num_threads(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if local_world_size is not None:
            os.environ["LOCAL_WORLD_SIZE"] = local_world_size
        random.setstate(state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
