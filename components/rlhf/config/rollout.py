"""Settings of what samples responses."""

from typing import Annotated, Literal

from pydantic import Field

from components.rlhf.config.base import BaseConfig, Positive, PositiveInt
from components.rlhf.config.model import SamplingConfig


class VllmConfig(BaseConfig):
    """vLLM, colocated with each training process."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Fraction of GPU memory for vLLM's weights and KV cache during rollouts; vLLM sleeps during updates."""
    kv_cache_gib: Positive = 1.0
    """Size of the KV cache on CPU, in GiB."""
    tensor_parallel_size: PositiveInt = 1
    """Number of consecutive ranks that share one vLLM engine by tensor parallelism; divides the number of processes."""


class EngineConfig(BaseConfig):
    """What samples responses."""

    engine: Literal["hf", "vllm"] = "hf"
    """Rollout engine, in each process: hf (transformers) or vllm."""
    vllm: VllmConfig = VllmConfig()


class RolloutConfig(EngineConfig):
    """Generation of the responses of one iteration."""

    num_prompts: PositiveInt = 64
    """Number of prompts per iteration, over all processes."""
    samples_per_prompt: PositiveInt = 1
    """Number of responses per prompt; the rollout batch is num_prompts x samples_per_prompt."""
    sampling: SamplingConfig = SamplingConfig()


def check_engine(
    rollout: EngineConfig, sampling: SamplingConfig, num_processes: int, *, keys: tuple[str, str, str]
) -> None:
    """Raise ValueError for what vLLM cannot do. keys are those of the three settings, for the message."""
    if rollout.engine != "vllm":
        return
    size, (rollout_key, sampling_key, processes_key) = rollout.vllm.tensor_parallel_size, keys
    if num_processes % size:
        raise ValueError(
            f"{rollout_key}.vllm.tensor_parallel_size is {size}, which does not divide {processes_key}, {num_processes}; "
            "choose a divisor"
        )
    if not 0.01 <= sampling.temperature <= 2:
        raise ValueError(
            f"{sampling_key}.temperature is {sampling.temperature}, but vLLM supports 0.01 to 2; choose a value in this range"
        )


def ranks_per_engine(rollout: EngineConfig) -> int:
    """Number of consecutive ranks that share an engine."""
    return rollout.vllm.tensor_parallel_size if rollout.engine == "vllm" else 1
