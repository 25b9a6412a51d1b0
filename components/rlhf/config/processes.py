"""How many processes a stage runs in."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a stage, on all of its nodes."""

    number: int = 1
    key: str = "num_processes"  # of this number in the params file, for messages
    timeout_minutes: float = 30.0
    ranks_per_engine: int = 1  # consecutive ranks that share a vLLM engine
