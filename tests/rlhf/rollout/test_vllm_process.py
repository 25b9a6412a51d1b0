"""What vLLM must find in a process, and what it must leave as it was; without vLLM."""

import os

import pytest
import torch

from components.rlhf.rollout.vllm_process import check_processes, preserve_process_state
from components.rlhf.text.errors import InputError


@pytest.mark.parametrize("before", ["2", None])
def test_number_of_local_processes_survives_an_engine(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if before is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", before)
    with pytest.raises(RuntimeError), preserve_process_state():
        os.environ["LOCAL_WORLD_SIZE"] = "1"  # as vLLM's platform for CPUs does
        raise RuntimeError("the engine did not start")
    assert os.environ.get("LOCAL_WORLD_SIZE") == before


@pytest.mark.parametrize(
    ("world_size", "on_node", "size", "message"),
    [
        (4, "2", 2, ""),
        (4, "4", 4, ""),
        (4, None, 4, ""),  # started without an agent that says
        (4, "2", 4, "is 4, but must divide the 2 processes of each node"),
        (4, "1", 2, "is 2, but must divide the 1 processes of each node"),
        (4, "4", 3, "is 3, but must divide the 4 training processes"),
    ],
)
def test_engine_lies_within_a_node(
    monkeypatch: pytest.MonkeyPatch, world_size: int, on_node: str | None, size: int, message: str
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if on_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_node)
    if not message:
        check_processes(size)
        return
    with pytest.raises(InputError, match=message):
        check_processes(size)
