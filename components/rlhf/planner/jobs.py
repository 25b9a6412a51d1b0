"""What the plans of all stages are computed from, and the parts that every process has."""

from dataclasses import dataclass

from components.rlhf.config.model import SamplingConfig, TrainingConfig
from components.rlhf.config.rollout import EngineConfig, VllmConfig
from components.rlhf.planner.activations import cache, sampling_workspace
from components.rlhf.planner.constants import (
    CUDA_CONTEXT,
    CUDA_LIBRARIES,
    DEEPSPEED,
    GPU_FRAGMENTATION,
    HEAP_LOSS,
    LAUNCHER,
    LIBRARIES,
    NCCL,
    PEFT,
    TRACKING,
    VLLM,
    VLLM_ASLEEP,
    VLLM_WORKSPACE,
)
from components.rlhf.planner.copies import Numeric, TrainedCopy, frozen_copy
from components.rlhf.planner.phases import GIB, Phase, add
from components.rlhf.planner.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Job:
    """The models of a run, and the lengths of its texts. Lengths are in tokens."""

    shape: ModelShape  # of the base model, the fine-tuned model and the policy
    reward_shape: ModelShape | None  # of the reward model; None in a run without one
    numeric: Numeric
    prompt_tokens: int  # the longest prompt
    text_tokens: int  # the longest prompt and answer of the data together
    judge_shape: ModelShape | None = None  # of a judge that is a reward model
    gpu_memory: int | None = None  # bytes of one device
    checkpoints: bool = True  # whether checkpoints are saved

    @property
    def critic_shape(self) -> ModelShape:
        """Of a critic, which reads the actor's ids: of a reward model with this vocabulary, or else of the fine-tuned model."""
        reward = self.reward_shape
        return reward if reward is not None and reward.vocab == self.shape.vocab else self.shape


def libraries(job: Job, training: TrainingConfig | None, *, vllm: bool = False, lora: bool = False) -> Phase:
    """What a process holds before it loads anything."""
    several = training is not None and training.num_processes > 1
    extra = (VLLM if vllm else 0) + (PEFT if lora else 0)
    extra += DEEPSPEED if training is not None and training.engine == "deepspeed" else 0
    if not job.numeric.on_gpu:
        return Phase(name="", device={}, main={"libraries": LIBRARIES + extra})
    context = {"CUDA context": CUDA_CONTEXT, "NCCL": NCCL if several else 0}
    return Phase(name="", device=context, main={"libraries": CUDA_LIBRARIES + extra})


def beside(num_processes: int) -> int:
    """Main memory of the other programs of a pod."""
    return TRACKING + (LAUNCHER if num_processes > 1 else 0)


def phase(name: str, *parts: Phase, device: dict[str, int] | None = None, main: dict[str, int] | None = None) -> Phase:
    """A phase with everything in parts, and more."""
    return Phase(
        name=name,
        device=add(*(part.device for part in parts), device or {}),
        main=add(*(part.main for part in parts), main or {}),
    )


def temporary(job: Job, parts: dict[str, int], *, churn: int = 0) -> dict[str, int]:
    """Temporary tensors, with what the allocator loses between them. churn is what is also allocated and freed meanwhile."""
    total = sum(parts.values())
    if job.numeric.on_gpu:
        return parts | {"fragmentation": round(GPU_FRAGMENTATION * total)}
    return parts | {"heap": round(HEAP_LOSS * (total + churn))}


def optimizer_of(copy: TrainedCopy, training: TrainingConfig) -> Phase:
    """Masters and moments, which may be in main memory."""
    parts = {"optimizer": copy.optimizer}
    if training.offload_optimizer:
        return Phase(name="", device={}, main=parts)
    return Phase(name="", device=parts, main={})


def vllm_share(job: Job, config: VllmConfig) -> tuple[int, int]:
    """Bytes of a vLLM engine in one process: all of it while it samples, and its weights alone."""
    weights = job.shape.total * job.numeric.width // config.tensor_parallel_size
    if not job.numeric.on_gpu:
        return weights + int(config.kv_cache_gib * 2**30), weights
    share = int((job.gpu_memory or 0) * config.gpu_memory_utilization)
    return max(share, weights), weights


def vllm_problem(job: Job, rollout: EngineConfig, sampling: SamplingConfig) -> str:
    """Why vLLM cannot start in its share of a GPU, as the end of a sentence; empty if it can."""
    if rollout.engine != "vllm" or not job.numeric.on_gpu or job.gpu_memory is None:
        return ""
    ranks = rollout.vllm.tensor_parallel_size
    share, (_, weights) = job.gpu_memory * rollout.vllm.gpu_memory_utilization, vllm_share(job, rollout.vllm)
    response = cache(job.shape, 1, job.prompt_tokens + sampling.max_new_tokens, job.numeric) // ranks
    needed = weights + VLLM_WORKSPACE + response
    if share >= needed:
        return ""
    return (
        f"vLLM gets {share / GIB:.1f} GiB of each GPU (gpu_memory_utilization {rollout.vllm.gpu_memory_utilization:g}), and its weights "
        f"{weights / GIB:.1f}, its workspace and the cache of one response take {needed / GIB:.1f}"
    )


def vllm_asleep(job: Job, config: VllmConfig) -> Phase:
    """What an engine holds while the trainer works: on a GPU its weights are in main memory, on a CPU nothing sleeps."""
    share, weights = vllm_share(job, config)
    if job.numeric.on_gpu:
        return Phase(name="", device={"vLLM, asleep": VLLM_ASLEEP}, main={"vLLM, asleep": weights})
    return Phase(name="", device={"vLLM": share}, main={})


def sampling_alone(
    job: Job, base: Phase, rollout: EngineConfig, sampling: SamplingConfig, rows: int, *, in_turns: bool = False
) -> Phase:
    """A rollout engine that samples before any other model is loaded, responses to `rows` prompts in this process."""
    if rollout.engine == "vllm":
        share, _ = vllm_share(job, rollout.vllm)
        return phase("generate", base, device={"vLLM": share})
    weights = {"sampled model": frozen_copy(job.shape.total, None, job.numeric)}
    work = sampling_workspace(job.shape, rows, job.prompt_tokens, sampling, job.numeric, in_turns=in_turns)
    return phase("generate", base, device=weights | temporary(job, work))


def files(job: Job, shape: ModelShape) -> dict[str, int]:
    """Without a GPU, pages of the files that are read, which the kernel could drop, in bytes."""
    return {} if job.numeric.on_gpu else {"files": shape.stored_bytes or 2 * shape.total}
