"""How long the stages take, from floating-point operations and memory traffic at assumed shares of the hardware's peaks."""

from collections.abc import Mapping
from dataclasses import dataclass

from components.rlhf.config.cluster import bytes_of
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.model import SamplingConfig, TrainingConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import EngineConfig
from components.rlhf.planner.activations import cache
from components.rlhf.planner.copies import Numeric, shards_weights
from components.rlhf.planner.plan import Shapes, stages_of
from components.rlhf.planner.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Peaks of one device, and the shares of them that the stages are assumed to reach."""

    name: str
    flops: float  # per second, in bf16
    bandwidth: float  # of its memory, in bytes per second
    links: float  # to the other devices of its node
    network: float  # to other nodes, its share of the node's
    training_share: float = 0.40
    forward_share: float = 0.50
    bandwidth_share: float = 0.60
    overhead_seconds: float = 60.0  # of starting a stage, loading and saving

    def sentence(self) -> str:
        return (
            f"{self.name}: {self.training_share:.0%} of {self.flops / 1e12:.3g} TFLOP/s in training, {self.forward_share:.0%} in forward "
            f"passes, {self.bandwidth_share:.0%} of {self.bandwidth / 1e12:.2g} TB/s in generation, {self.links / 1e9:.0f} GB/s "
            f"between the devices of a node and {self.network / 1e9:.0f} GB/s of each to other nodes, "
            f"{self.overhead_seconds:.0f} s to start"
        )


# Data sheets: dense bf16 without sparsity, by the memory of the device. Links and network: what collective operations reach, assumed.
SPEEDS = {
    24: Speed(name="24 GB (L4)", flops=121e12, bandwidth=0.3e12, links=20e9, network=10e9),
    80: Speed(name="80 GB (H100 SXM)", flops=989e12, bandwidth=3.35e12, links=300e9, network=40e9),
    141: Speed(name="141 GB (H200)", flops=989e12, bandwidth=4.8e12, links=300e9, network=40e9),
}
# Measured on two cores of a server (benchmarks/LOG.md); the bandwidth is that of its memory.
CPU = Speed(
    name="CPU, two cores",
    flops=160e9,
    bandwidth=15e9,
    links=5e9,
    network=1e9,
    training_share=0.5,
    forward_share=0.6,
    bandwidth_share=0.4,
    overhead_seconds=15,
)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds of a stage by what takes them."""

    parts: Mapping[str, float]
    note: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def speed_of(gpu_memory: int | None, *, on_gpu: bool) -> Speed:
    """The speed of the smallest known device that has this much memory."""
    if not on_gpu:
        return CPU
    size = (gpu_memory or 80 * 2**30) / 2**30
    return next((speed for limit, speed in SPEEDS.items() if size <= limit), SPEEDS[141])


def seconds_of_run(params: Params, shapes: Shapes, sizes: Mapping[str, int]) -> dict[str, Seconds]:
    """Estimated seconds of each stage. sizes are the numbers of demonstrations and of pairs, where max_steps does not limit them."""
    found = {}
    for stage in stages_of(params):
        profile = params.cluster.profile(stage)
        memory = bytes_of(profile.gpu_memory) if profile.gpu_memory else None
        speed = speed_of(memory, on_gpu=profile.num_accelerators > 0)
        found[stage] = _stage(params, shapes, stage, speed, sizes)
    return found


def _stage(params: Params, shapes: Shapes, stage: str, speed: Speed, sizes: Mapping[str, int]) -> Seconds:
    start = {"start": speed.overhead_seconds}
    length = params.data.max_tokens
    pods = params.cluster.profile(stage).num_nodes
    if stage == "sft":
        steps = _steps(
            params.sft.max_steps, params.sft.num_epochs, params.sft.batch_size, sizes.get("demonstrations", 0)
        )
        tokens = steps * params.sft.batch_size * length
        return _trained(start, tokens, shapes.base, params, params.sft.training, speed, steps, pods)
    if stage == "reward_model":
        section = params.reward_model
        start["calibration"] = _calibration(params, shapes.base, speed)
        if section.use:
            return Seconds(parts=start)
        steps = _steps(section.max_steps, section.num_epochs, section.batch_size, sizes.get("preferences", 0))
        tokens = 2 * steps * section.batch_size * length
        return _trained(start, tokens, shapes.base, params, section.training, speed, steps, pods)
    if stage == "ppo":
        return _ppo(start, params, shapes, speed, pods)
    if stage == "evaluation":
        return _evaluation(start, params, shapes, speed)
    if stage == "import_model":
        return Seconds(parts=start | {"copy": 4 * shapes.base.total / 1e9})
    return Seconds(parts=start)


def _steps(max_steps: int, num_epochs: int, batch: int, records: int) -> int:
    steps = num_epochs * -(-records // batch) if records else 0
    return min(steps, max_steps) if steps and max_steps else steps or max_steps


def _trained(
    start: dict[str, float],
    tokens: int,
    shape: ModelShape,
    params: Params,
    training: TrainingConfig,
    speed: Speed,
    steps: int,
    pods: int,
) -> Seconds:
    compute = (
        training_flops(shape, tokens, params, training) / (speed.flops * speed.training_share) / training.num_processes
    )
    traffic = Traffic(shape=shape, params=params, training=training, speed=speed, pods=pods)
    seconds = max(compute, traffic.update_seconds(tokens, steps))
    note = "" if steps else "the number of records is not known: set max_steps, or pass --records"
    return Seconds(parts=start | {"update": seconds}, note=note)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the processes of a stage send each other; it goes on beside the computation, and whichever takes longer counts."""

    shape: ModelShape
    params: Params
    training: TrainingConfig
    speed: Speed
    pods: int

    @property
    def width(self) -> int:
        return 4 if self.params.model.precision == "fp32" else 2

    def _seconds(self, sent: float) -> float:
        if self.training.num_processes == 1:
            return 0.0
        return sent / (self.speed.links if self.pods == 1 else self.speed.network)

    def passes(self, tokens: float, steps: int) -> float:
        """Passes of one process over all these tokens, at least one in each step."""
        return max(tokens / self.training.num_processes / self.training.microbatch_tokens, steps)

    def update_seconds(self, tokens: float, steps: int) -> float:
        """ZeRO-3 gathers the weights for the forward and the backward pass, and scatters gradients; the others reduce gradients."""
        model = self.params.model
        trained = self.shape.trained(model.num_frozen_layers)
        if model.lora:
            trained = self.shape.adapters(model.lora.rank, model.lora.target_modules, model.num_frozen_layers)
        if shards_weights(self.training):
            return self._seconds(self.passes(tokens, steps) * 3 * self.width * self.shape.total)
        if self.training.engine == "deepspeed":
            return self._seconds((self.passes(tokens, steps) + steps) * self.width * trained)
        return self._seconds(steps * 8 * trained)

    def forward_seconds(self, tokens: float, steps: int) -> float:
        """Gathering the weights of one model for forward passes."""
        if not shards_weights(self.training):
            return 0.0
        return self._seconds(self.passes(tokens, steps) * self.width * self.shape.total)

    def sync_seconds(self) -> float:
        """Every process gathers all weights once, for its rollout engine."""
        return self._seconds(self.width * self.shape.total) if shards_weights(self.training) else 0.0


def training_flops(shape: ModelShape, tokens: int, params: Params, training: TrainingConfig) -> float:
    """2 operations a parameter and token forward, 4 backward, and 2 to recompute; frozen weights have no gradient of their own.

    Layers below the trained ones run forward only. Attention adds 2 x layers x width operations for each earlier token.
    """
    frozen = params.model.num_frozen_layers
    below = sum(shape.layers[:frozen])
    above = shape.active - below
    backward = 2.0 if params.model.lora else 4.0
    recompute = 2.0 if training.gradient_checkpointing else 0.0
    per_token = 2 * below + (2 + backward + recompute) * above
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * params.data.max_tokens / 2
    return tokens * (per_token + attention)


def generation_seconds(
    shape: ModelShape, sequences: int, prompt: int, new: int, *, batch: int, speed: Speed, shares: int, numeric: Numeric
) -> float:
    """Sampling on one device that holds 1 / shares of the weights: prompts at the speed of forward passes, then each step reads the
    weights and the cache of `batch` sequences, or computes, whichever takes longer."""
    batch = min(batch, sequences)
    if not batch:
        return 0.0
    rounds = -(-sequences // batch)
    prefill = 2 * shape.active * sequences * prompt / (speed.flops * speed.forward_share) / shares
    read = shape.active * numeric.width / shares + cache(shape, batch, prompt + new // 2, numeric) / shares
    compute = 2 * shape.active * batch / shares / (speed.flops * speed.forward_share)
    return prefill + rounds * new * max(read / (speed.bandwidth * speed.bandwidth_share), compute)


def _calibration(params: Params, shape: ModelShape, speed: Speed) -> float:
    """Seconds in which the processes of the reward model stage sample the responses of its calibration."""
    return _sampled(
        shape,
        params.reward_model.num_calibration_samples,
        params,
        params.ppo.rollout,
        params.ppo.rollout.sampling,
        params.reward_model.training.num_processes,
        speed,
    )


def _sampled(
    shape: ModelShape,
    sequences: int,
    params: Params,
    rollout: EngineConfig,
    sampling: SamplingConfig,
    processes: int,
    speed: Speed,
) -> float:
    """Seconds in which all processes sample so many responses; those that share an engine sample theirs together."""
    shares = rollout.vllm.tensor_parallel_size if rollout.engine == "vllm" else 1
    return generation_seconds(
        shape,
        -(-sequences * shares // processes),
        params.data.max_prompt_tokens,
        sampling.max_new_tokens,
        batch=sampling.batch_size,
        speed=speed,
        shares=shares,
        numeric=Numeric(bf16=params.model.precision != "fp32", on_gpu=False),
    )


def _ppo(start: dict[str, float], params: Params, shapes: Shapes, speed: Speed, pods: int) -> Seconds:
    ppo, training, shape = params.ppo, params.ppo.training, shapes.base
    rollout, sampling = ppo.rollout, ppo.rollout.sampling
    processes, numeric = training.num_processes, Numeric(bf16=params.model.precision != "fp32", on_gpu=False)
    sequences = rollout.num_prompts * rollout.samples_per_prompt
    prompt, new = params.data.max_prompt_tokens, sampling.max_new_tokens
    tokens = sequences * (prompt + new)
    generate = _sampled(shape, sequences, params, rollout, sampling, processes, speed)
    passes = (1 if ppo.old_logprobs == "engine" else 2) * shape.active + shapes.reward_model.active * 2
    frozen = params.model.num_frozen_layers
    passes -= 3 * sum(shape.layers[:frozen])  # once for all models
    traffic = Traffic(shape=shape, params=params, training=training, speed=speed, pods=pods)
    steps = ppo.num_epochs * -(-sequences // ppo.minibatch)
    score = 2 * passes * tokens / (speed.flops * speed.forward_share) / processes
    score = max(score, 4 * traffic.forward_seconds(tokens, steps))
    update = training_flops(shape, tokens, params, training)
    if frozen:
        update -= tokens * 2 * sum(shape.layers[:frozen])
    update = ppo.num_epochs * update / (speed.flops * speed.training_share) / processes
    update = max(update, traffic.update_seconds(ppo.num_epochs * tokens, steps))
    update *= 2 if ppo.critic.trains == "layers" else 1
    sync = traffic.sync_seconds() + shape.total * numeric.width / 20e9 * (rollout.engine == "vllm")
    each = {"generate": generate, "score": score, "update": update, "sync": sync}
    validation = ppo.num_iterations // ppo.eval_every if ppo.eval_every else 0
    share = params.data.num_validation_prompts / sequences
    parts = {name: ppo.num_iterations * seconds for name, seconds in each.items()}
    parts["validation"] = validation * share * (generate + score)
    return Seconds(parts=start | parts)


def _evaluation(start: dict[str, float], params: Params, shapes: Shapes, speed: Speed) -> Seconds:
    config = params.stage(EvaluationStageConfig)
    evaluation, processes = config.evaluation, config.evaluation.num_processes
    sequences = evaluation.num_prompts * evaluation.num_samples
    tokens = sequences * (params.data.max_prompt_tokens + config.sampling.max_new_tokens)
    generate = _sampled(shapes.base, sequences, params, config.rollout, config.sampling, processes, speed)
    passes = 2 * (2 * shapes.base.active + 2 * shapes.reward_model.active) * tokens
    return Seconds(
        parts=start | {"generate": 2 * generate, "score": passes / (speed.flops * speed.forward_share) / processes}
    )
