"""How long the stages take, from floating-point operations and memory traffic at assumed shares of the hardware's peaks."""

from collections.abc import Mapping
from dataclasses import dataclass

from components.rlhf.config.checks import LmEvalCheck, PerplexityCheck, PromptsCheck
from components.rlhf.config.cluster import bytes_of
from components.rlhf.config.environment import FunctionEnvironment
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.model import SamplingConfig, TrainingConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.config.reward_model import RewardModelConfig
from components.rlhf.config.rewards import CommandReward, EndpointReward, FunctionReward, HttpReward
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.planner.activations import cache
from components.rlhf.planner.copies import Numeric, shards_weights
from components.rlhf.planner.plan import Shapes, job_of, machine_of, reward_model_section, stages_of
from components.rlhf.planner.shape import ModelShape
from components.rlhf.planner.speeds import Speed, speed_of


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds of a stage by what takes them."""

    parts: Mapping[str, float]
    note: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


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
        section = reward_model_section(params)
        start["calibration"] = _calibration(section, params, shapes.base, speed)
        if section.use:
            return Seconds(parts=start)
        steps = _steps(section.max_steps, section.num_epochs, section.batch_size, sizes.get("preferences", 0))
        tokens = 2 * steps * section.batch_size * length
        return _trained(start, tokens, shapes.base, params, section.training, speed, steps, pods)
    if stage == "dpo":
        return _dpo(start, params, shapes, speed, sizes, pods)
    if stage == "ppo":
        return _ppo(start, params, shapes, speed, pods)
    if stage == "evaluation":
        return _evaluation(start, params, shapes, speed)
    if stage == "checks":
        return _checks(start, params, shapes, speed)
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


def _calibration(section: RewardModelConfig, params: Params, shape: ModelShape, speed: Speed) -> float:
    """Seconds in which the processes of the reward model stage sample the responses of its calibration."""
    return _sampled(
        shape,
        section.num_calibration_samples,
        params,
        params.ppo.rollout,
        params.ppo.rollout.sampling,
        section.training.num_processes,
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


def _dpo(
    start: dict[str, float], params: Params, shapes: Shapes, speed: Speed, sizes: Mapping[str, int], pods: int
) -> Seconds:
    """The reference computes each text once, whatever the number of epochs; kto also compares it on a mismatched answer in each step."""
    dpo, texts = params.dpo, 2 if params.dpo.is_paired else 1
    steps = _steps(dpo.max_steps, dpo.num_epochs, dpo.batch_size, sizes.get("preferences", 0))
    tokens = texts * steps * dpo.batch_size * params.data.max_tokens
    if dpo.has_reference:
        flops = 2 * shapes.base.active * tokens * (1 / dpo.num_epochs + (0 if dpo.is_paired else 2))
        start["reference"] = flops / (speed.flops * speed.forward_share) / dpo.training.num_processes
    return _trained(start, tokens, shapes.base, params, dpo.training, speed, steps, pods)


def _ppo(start: dict[str, float], params: Params, shapes: Shapes, speed: Speed, pods: int) -> Seconds:
    ppo, processes = params.ppo, params.ppo.training.num_processes
    rollout, sampling = ppo.rollout, ppo.longest_sampling
    sequences = rollout.num_prompts * rollout.samples_per_prompt
    greedy = rollout.num_prompts if ppo.advantage == "remax" else 0  # a second call of the engine
    length = params.data.max_prompt_tokens + sampling.max_new_tokens
    steps = ppo.num_epochs * -(-sequences // ppo.minibatch)
    critic = critic_of(params, shapes)

    def traffic(shape: ModelShape) -> Traffic:
        return Traffic(shape=shape, params=params, training=ppo.training, speed=speed, pods=pods)

    def update(shape: ModelShape, tokens: int) -> float:
        flops = training_flops(shape, tokens, params, ppo.training)
        flops -= tokens * 2 * sum(shape.layers[: params.model.num_frozen_layers])  # computed once, before the epochs
        compute = flops / (speed.flops * speed.training_share) / processes
        return max(compute, traffic(shape).update_seconds(tokens, steps))

    generate = sum(
        _sampled(shapes.base, count, params, rollout, sampling, processes, speed) for count in (sequences, greedy)
    )
    passes, num_models = scoring_passes(params, shapes, critic)
    flops = 2 * passes * sequences * length
    flops += 2 * (shapes.reward_model.active if shapes.reward_model else 0) * greedy * length
    score = flops / (speed.flops * speed.forward_share) / processes
    score = max(score, num_models * traffic(shapes.base).forward_seconds(sequences * length, steps))
    demonstrations = steps * ppo.minibatch * params.data.max_tokens if ppo.ptx_coef else 0
    actor = update(shapes.base, ppo.num_epochs * sequences * length + demonstrations)
    both = actor * (1 - ppo.critic.warmup_iterations / ppo.num_iterations)
    if critic is not None and ppo.critic.trains == "layers":
        both += update(critic, ppo.num_epochs * sequences * length)
    width = 4 if params.model.precision == "fp32" else 2
    sync = traffic(shapes.base).sync_seconds() + shapes.base.total * width / 20e9 * (rollout.engine == "vllm")
    each = {"generate": generate, "score": score, "update": both, "sync": sync}
    validation = ppo.num_iterations // ppo.eval_every if ppo.eval_every else 0
    share = params.data.num_validation_prompts / sequences
    parts = {name: ppo.num_iterations * seconds for name, seconds in each.items()}
    parts["validation"] = validation * share * (generate + score)
    return Seconds(parts=start | parts, note=_uncounted_rewards(ppo))


def critic_of(params: Params, shapes: Shapes) -> ModelShape | None:
    """The shape of PPO's critic, if its estimator of advantages has one."""
    if params.ppo.advantage != "gae":
        return None
    machine = machine_of(params.cluster.profile("ppo"), params.model.precision)
    return job_of(params, shapes, machine).critic_shape


def scoring_passes(params: Params, shapes: Shapes, critic: ModelShape | None) -> tuple[int, int]:
    """Active parameters of all models that compute the tokens of a rollout, with the frozen layers once; and the number of models."""
    computing = [shapes.base] * (1 if params.ppo.old_logprobs == "engine" else 2)  # reference, actor
    computing += [shape for shape in (critic, shapes.reward_model) if shape is not None]
    frozen = sum(shapes.base.layers[: params.model.num_frozen_layers])
    return sum(shape.active for shape in computing) - (len(computing) - 1) * frozen, len(computing)


def _uncounted_rewards(ppo: PpoConfig) -> str:
    """A note on rewards and an environment whose time is not known before they run."""
    names = [
        reward.title
        for reward in ppo.rewards
        if isinstance(reward, (FunctionReward, CommandReward, HttpReward, EndpointReward))
    ]
    parts = [f"the rewards {', '.join(names)}"] if names else []
    parts += ["the environment"] if isinstance(ppo.environment, FunctionEnvironment) else []
    return f"without the time of {' and '.join(parts)}, which is not known" if parts else ""


def _evaluation(start: dict[str, float], params: Params, shapes: Shapes, speed: Speed) -> Seconds:
    """Of both policies in a run with two, the second time without the responses of the SFT model."""
    config, policies = params.stage(EvaluationStageConfig), len(params.policy.methods)
    evaluation, processes = config.evaluation, config.evaluation.num_processes
    sequences = evaluation.num_prompts * evaluation.num_samples
    tokens = sequences * (params.data.max_prompt_tokens + config.longest_sampling.max_new_tokens)
    generate = _sampled(shapes.base, sequences, params, config.rollout, config.sampling, processes, speed)
    scored = shapes.reward_model.active if shapes.reward_model else 0
    passes = 2 * (2 * shapes.base.active + 2 * scored) * tokens
    score = passes / (speed.flops * speed.forward_share) / processes
    starts = {name: policies * seconds for name, seconds in start.items()}
    return Seconds(parts=starts | {"generate": (1 + policies) * generate, "score": policies * score})


def _checks(start: dict[str, float], params: Params, shapes: Shapes, speed: Speed) -> Seconds:
    """Both models, of each policy of the run, in one process."""
    times, checks = 2 * len(params.policy.methods), params.gate.checks
    prompts = sum(len(check.prompts) for check in checks if isinstance(check, PromptsCheck))
    sampling = params.evaluation_sampling
    generate = _sampled(shapes.base, prompts, params, EngineConfig(), sampling, 1, speed) if prompts else 0.0
    texts = sum(check.num_texts for check in checks if isinstance(check, PerplexityCheck))
    flops = 2 * shapes.base.active * texts * params.data.max_tokens
    parts = {"generate": times * generate, "perplexity": times * flops / (speed.flops * speed.forward_share)}
    has_harness = any(isinstance(check, LmEvalCheck) for check in checks)
    note = "without the time of lm-evaluation-harness, which depends on its tasks" if has_harness else ""
    return Seconds(parts=start | parts, note=note)
