"""The plan of the stage ppo: up to four models, a rollout engine, and the experience of a rollout."""

from dataclasses import replace

from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.planner.activations import Pass, forward_workspace, logits, sampling_workspace
from components.rlhf.planner.copies import TrainedCopy
from components.rlhf.planner.jobs import (
    Job,
    beside,
    libraries,
    optimizer_of,
    phase,
    temporary,
    vllm_asleep,
    vllm_problem,
    vllm_share,
)
from components.rlhf.planner.phases import Phase, StagePlan
from components.rlhf.planner.ppo_models import Copies, ppo_copies
from components.rlhf.planner.shape import ModelShape
from components.rlhf.planner.training_stages import (
    export_phase,
    load_peak,
    lost_in_loading,
    tokens_of_pass,
    training_phases,
    whole_weights,
)


def plan_ppo(config: PpoStageConfig, job: Job) -> StagePlan:
    ppo, training = config.ppo, config.ppo.training
    vllm = ppo.rollout.engine == "vllm"
    base = libraries(job, training, vllm=vllm, lora=config.model.lora is not None)
    copies = ppo_copies(config, job)
    engine = vllm_asleep(job, ppo.rollout.vllm) if vllm else Phase(name="", device={}, main={})
    resident = phase(
        "",
        optimizer_of(copies.actor, training),
        optimizer_of(copies.critic, training),
        device={
            "weights": copies.actor.weights + copies.critic.weights,
            "reference": copies.reference,
            "reward model": copies.reward_model,
            "critic's base": copies.critic_base,
            "rollout copy": copies.rollout,
            "engine": copies.actor.buffers + copies.critic.buffers,
        }
        | lost_in_loading(job.shape, config.model, job),
    )
    held = phase("", resident, engine, device={"experience": _experience(config, job)})
    phases = [
        phase(
            "load", base, engine, device=_loading(config, copies, job), main=whole_weights(job.shape, config.model, job)
        ),
        _generate(config, base, resident, job),
        _score(config, base, held, copies, job),
        *_updates(config, base, held, copies, job),
        _sync(config, base, resident, job),
        export_phase(base, resident, job.shape, config.model, job),
    ]
    return StagePlan(
        stage="ppo",
        num_processes=training.num_processes,
        on_gpu=job.numeric.on_gpu,
        phases=tuple(phases),
        beside=beside(training.num_processes),
        problem=vllm_problem(job, ppo.rollout, ppo.longest_sampling),
    )


def _rows(config: PpoStageConfig) -> int:
    rollout = config.ppo.rollout
    return -(-rollout.num_prompts * rollout.samples_per_prompt // config.ppo.training.num_processes)


def _length(config: PpoStageConfig, job: Job) -> int:
    return job.prompt_tokens + config.ppo.longest_sampling.max_new_tokens


def _experience(config: PpoStageConfig, job: Job) -> int:
    """ppo/experience.py: a dozen numbers for each response token, ids, and states that are kept for all models and epochs."""
    rows, length, new = _rows(config), _length(config, job), config.ppo.longest_sampling.max_new_tokens
    size = rows * (new * 13 * 4 + length * 16)
    if config.model.num_frozen_layers:
        size += rows * length * job.shape.hidden * job.numeric.width
    if config.ppo.critic.trains == "head":
        size += rows * new * job.shape.hidden * 4
    return size


def _loading(config: PpoStageConfig, copies: Copies, job: Job) -> dict[str, int]:
    """All models, each of them whole until the frozen layers are shared, and the engines while they take the weights over."""
    training, shape = config.ppo.training, job.shape
    parts = load_peak(copies.actor, shape, config.model, training, job)
    second = copies.reward_model or copies.critic_base  # the reward model comes second, or a critic without one
    if config.model.quantization and not job.numeric.on_gpu and second:
        parts["weights"] = copies.actor.weights
        parts["weights before they are quantized"] = job.numeric.width * shape.total - second
    parts["weights"] += copies.critic.weights
    parts |= {
        "reference": copies.reference,
        "reward model": copies.reward_model,
        "critic's base": copies.critic_base,
        "rollout copy": copies.rollout,
    }
    if config.model.num_frozen_layers:
        shared = shape.frozen(config.model.num_frozen_layers) * job.numeric.width
        own = [
            copies.reference,
            copies.reward_model,
            copies.critic_base,
            copies.rollout,
            0 if config.ppo.critic.trains == "head" else copies.critic.weights,
        ]
        parts["layers before they are shared"] = shared * sum(1 for size in own if size)
    if training.engine == "deepspeed" and training.zero_stage < 3:
        parts["flat copy"] = max(copies.actor.weights, copies.critic.weights)
    return parts


def _generate(config: PpoStageConfig, base: Phase, resident: Phase, job: Job) -> Phase:
    rollout, prompt = config.ppo.rollout, job.prompt_tokens
    if rollout.engine == "vllm":
        share, weights = vllm_share(job, rollout.vllm)
        return phase(
            "generate",
            base,
            resident,
            device={"vLLM": share},
            main={"vLLM, asleep": weights if job.numeric.on_gpu else 0},
        )
    playing = config.ppo.environment is not None
    work = sampling_workspace(
        job.shape, _rows(config), prompt, config.ppo.longest_sampling, job.numeric, in_turns=playing
    )
    return phase("generate", base, resident, device=temporary(job, work))


def _score(config: PpoStageConfig, base: Phase, held: Phase, copies: Copies, job: Job) -> Phase:
    tokens, answers = _tokens(config, job)
    work = {
        "activations": forward_workspace(job.shape, tokens, job.numeric),
        "logits": logits(job.shape, answers, job.numeric, config.ppo.longest_sampling),
        "cast weights": copies.actor.cast,
        "working weights": copies.actor.working,
    }
    return phase("score", base, held, device=temporary(job, work))


def _tokens(config: PpoStageConfig, job: Job) -> tuple[int, int]:
    """Tokens of the largest pass of a minibatch, and how many of them are responses."""
    length, new = _length(config, job), config.ppo.longest_sampling.max_new_tokens
    tokens = tokens_of_pass(config.ppo.training, config.ppo.minibatch, length)
    return tokens, tokens * new // length


def _updates(config: PpoStageConfig, base: Phase, held: Phase, copies: Copies, job: Job) -> list[Phase]:
    """The actor takes its step before the critic begins; a checkpoint of both may be on its way to the store meanwhile."""
    ppo, training, model = config.ppo, config.ppo.training, config.model
    tokens, answers = _tokens(config, job)

    def run(shape: ModelShape, tokens: int, answer_tokens: int, *, sampled: bool) -> Pass:
        return Pass(
            shape=shape,
            tokens=tokens,
            answer_tokens=answer_tokens,
            frozen_layers=model.num_frozen_layers,
            lora=model.lora,
            training=training,
            numeric=job.numeric,
            sampling=ppo.longest_sampling if sampled else None,
            with_entropy=sampled and ppo.entropy_coef > 0,
        )

    if training.engine == "deepspeed" and not job.numeric.on_gpu:
        # In a heap the flat tensors of one engine do not take the place of those of the other.
        other = min((copies.actor, copies.critic), key=lambda copy: copy.weights)
        held = phase("", held, device={"the other engine": other.gradients + other.working + other.step})
    runs = [run(job.shape, tokens, answers, sampled=True)]
    if ppo.ptx_coef:  # as many demonstrations as responses, of which every token may be learned
        texts = tokens_of_pass(training, ppo.minibatch, job.text_tokens)
        runs.append(run(job.shape, texts, texts, sampled=False))
    actors = [training_phases(base, held, _unbuffered(copies.actor), r, job, with_logits=True) for r in runs]
    update, step = (
        max(found, key=lambda p: sum(p.device.values())) for found in zip(*(a[:2] for a in actors), strict=True)
    )
    if ppo.advantage == "gae" and ppo.critic.trains == "layers":
        critic = training_phases(
            base,
            held,
            _unbuffered(copies.critic),
            run(job.critic_shape, tokens, 0, sampled=True),
            job,
            with_logits=False,
        )
        update = max(update, critic[0], key=lambda found: sum(found.device.values()))
    phases = [update, step]
    saved = copies.actor.snapshot + copies.critic.snapshot
    # The best policy is kept without its moments; what the guard returns to has them.
    kept = copies.actor.snapshot // 3 if ppo.keeps_best else 0
    size = saved if job.checkpoints or ppo.guard.action != "off" else kept
    return [*phases, phase("checkpoint", update, main={"checkpoint": size})] if size else phases


def _unbuffered(copy: TrainedCopy) -> TrainedCopy:
    """A copy whose permanent buffers are counted elsewhere."""
    return replace(copy, buffers=0)


def _sync(config: PpoStageConfig, base: Phase, resident: Phase, job: Job) -> Phase:
    """Weights go to the rollout engine one after another; vLLM's own weights are back on the GPU."""
    parts = {"a tensor": 2 * job.numeric.width * job.shape.largest}
    if config.ppo.rollout.engine == "vllm":
        share, weights = vllm_share(job, config.ppo.rollout.vllm)
        parts["vLLM"] = weights if job.numeric.on_gpu else share
    return phase("sync", base, resident, device=parts)
