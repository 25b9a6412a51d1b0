"""Plans of the stages sft, dpo and reward_model."""

from dataclasses import replace

from components.rlhf.config.dpo import DpoStageConfig
from components.rlhf.config.model import ModelConfig, TrainingConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.sft import SftStageConfig
from components.rlhf.planner.activations import (
    Pass,
    backward_workspace,
    forward_workspace,
    logits,
    lost_to_adapters,
    saved_activations,
)
from components.rlhf.planner.constants import FROZEN_STATES, HEAP_LOSS, NF4_BYTES
from components.rlhf.planner.copies import TrainedCopy, frozen_copy, gathered, trained_copy
from components.rlhf.planner.jobs import (
    Job,
    beside,
    files,
    libraries,
    optimizer_of,
    phase,
    sampling_alone,
    temporary,
    vllm_problem,
)
from components.rlhf.planner.phases import Phase, StagePlan
from components.rlhf.planner.shape import ModelShape


def model_copy(
    shape: ModelShape, model: ModelConfig, training: TrainingConfig, job: Job, *, scalar: bool, earlier: int = 0
) -> TrainedCopy:
    """A trained model of this shape: all weights that are not frozen, or adapters and a scalar head.

    earlier is the number of stages that have trained adapters of it before.
    """
    if model.lora is None:
        trained, frozen = shape.trained(model.num_frozen_layers, scalar=scalar), shape.frozen(model.num_frozen_layers)
        # The largest tensor is that of the embeddings, or of the head, which is trained with the layers.
        return trained_copy(trained, frozen, min(shape.largest, trained), training, job.numeric)
    trained = shape.adapters(model.lora.rank, model.lora.target_modules, model.num_frozen_layers)
    trained += shape.hidden if scalar else 0
    copy = trained_copy(trained, 0, min(shape.largest, trained), training, job.numeric)
    return replace(copy, weights=copy.weights + base_bytes(shape, model, job, scalar=scalar, earlier=earlier))


def base_bytes(shape: ModelShape, model: ModelConfig, job: Job, *, scalar: bool, earlier: int = 0) -> int:
    """The frozen weights below adapters: in the computing precision, or the linear ones of the layers in 4 bits (models/nf4.py).

    Of a model in 4 bits the adapters of the earlier stages, in fp32, are not merged into its weights.
    """
    total = shape.parameters(scalar=scalar)
    if model.lora is None or model.quantization is None:
        return job.numeric.width * total
    adapters = shape.adapters(model.lora.rank, model.lora.target_modules, model.num_frozen_layers)
    return job.numeric.width * (total - shape.linear_parameters) + packed_bytes(shape) + 4 * earlier * adapters


def packed_bytes(shape: ModelShape) -> int:
    """The linear weights of all layers in 4 bits, with the scales of their blocks."""
    return round(shape.linear_parameters * NF4_BYTES)


def tokens_of_pass(training: TrainingConfig, rows: int, length: int, *, unit: int = 1) -> int:
    """Tokens of the largest pass: the budget, as far as a process has rows; `unit` rows, however long, always go together."""
    own = -(-rows // training.num_processes) * unit * length
    return max(min(training.microbatch_tokens, own), unit * length)


def update_parts(run: Pass, *, with_logits: bool) -> dict[str, int]:
    """Temporary tensors of a forward and backward pass."""
    parts = {"activations": saved_activations(run) + backward_workspace(run)}
    if run.lora and run.lora.quantization:  # one matrix is whole at a time
        parts["dequantized weight"] = (4 + run.numeric.width) * max(
            (m.inputs * m.outputs for m in run.shape.linears), default=0
        )
    if with_logits:
        parts["logits"] = logits(run.shape, run.answer_tokens, run.numeric, run.sampling, with_entropy=run.with_entropy)
    return parts


def load_peak(
    copy: TrainedCopy, shape: ModelShape, model: ModelConfig, training: TrainingConfig, job: Job
) -> dict[str, int]:
    """Weights of a loaded model, one tensor in its stored and its own precision, and the engine while it takes the weights over."""
    width = 4 if training.engine == "torch" else job.numeric.width
    parts = {"weights": copy.weights, "a tensor": (2 + width) * shape.largest}
    if model.quantization and not job.numeric.on_gpu:  # whole, until its layers are quantized one by one
        parts["weights"] = job.numeric.width * shape.total
    parts |= files(job, shape)
    if training.engine == "deepspeed" and training.zero_stage < 3:
        parts["flat copy"] = copy.weights
    return parts


def whole_weights(shape: ModelShape, model: ModelConfig, job: Job) -> dict[str, int]:
    """Weights in main memory beside a GPU, before they are quantized and moved to it."""
    waits = model.quantization is not None and job.numeric.on_gpu
    return {"weights before they are quantized": job.numeric.width * shape.total} if waits else {}


def lost_in_loading(shape: ModelShape, model: ModelConfig, job: Job) -> dict[str, int]:
    """What a heap does not give back of the weights before they were quantized, because what is kept lies between them."""
    if model.quantization is None or job.numeric.on_gpu:
        return {}
    freed = job.numeric.width * shape.linear_parameters - packed_bytes(shape)
    return {"heap, of loading": round(HEAP_LOSS * freed)}


def training_phases(
    base: Phase, resident: Phase, copy: TrainedCopy, run: Pass, job: Job, *, with_logits: bool
) -> list[Phase]:
    """Update, step and checkpoint of a model whose weights and optimizer are in `resident`."""
    parts = update_parts(run, with_logits=with_logits)
    temporaries = temporary(job, parts, churn=lost_to_adapters(run) + (copy.working if copy.gathers else 0))
    held = {"gradients": copy.gradients, "engine": copy.buffers}
    working = {"cast weights": copy.cast, "working weights": copy.working}
    update = phase("update", base, resident, device=held | temporaries | working)
    kept: dict[str, int] = {}
    step_bytes = copy.step
    if (
        not job.numeric.on_gpu
    ):  # a heap does not give back what a pass has used, in pieces that are too small for DeepSpeed's flat tensors
        kept = temporaries
        step_bytes -= 0 if run.training.engine == "deepspeed" else min(copy.step, sum(temporaries.values()))
    step = phase("step", base, resident, device=held | kept | {"step": step_bytes})
    phases = [update, step]
    if job.checkpoints:
        phases.append(phase("checkpoint", update, main={"checkpoint": copy.snapshot}))
    return phases


def plan_sft(config: SftStageConfig, job: Job) -> StagePlan:
    training = config.sft.training
    tokens = tokens_of_pass(training, config.sft.batch_size, job.text_tokens)
    copy = model_copy(job.shape, config.model, training, job, scalar=False)
    return _plan("sft", training, _language_model_phases(config.model, training, copy, tokens, job), job)


def plan_dpo(config: DpoStageConfig, job: Job) -> StagePlan:
    """As sft, with the texts of a pair in one pass. The log-probs of the reference are computed before the policy is trained, by itself."""
    dpo, training = config.dpo, config.dpo.training
    tokens = tokens_of_pass(training, dpo.batch_size, job.text_tokens, unit=2 if dpo.is_paired else 1)
    copy = model_copy(job.shape, config.model, training, job, scalar=False, earlier=1)
    kept = _frozen_states(config, job)
    phases = _language_model_phases(config.model, training, copy, tokens, job, kept=kept)
    if dpo.has_reference:
        own = dpo.reference_microbatch_tokens or training.microbatch_tokens
        work = {
            "activations": forward_workspace(job.shape, max(own, job.text_tokens), job.numeric),
            "logits": logits(job.shape, own, job.numeric, None),
            "cast weights": copy.cast,
            "working weights": copy.working,
        }
        base = libraries(job, training, lora=config.model.lora is not None)
        held = phase("", optimizer_of(copy, training), device={"weights": copy.weights, "engine": copy.buffers} | kept)
        phases.insert(1, phase("reference", base, held, device=temporary(job, work)))
    return _plan("dpo", training, phases, job)


def _frozen_states(config: DpoStageConfig, job: Job) -> dict[str, int]:
    """Output of the frozen layers for the texts of all steps (dpo/states.py), or as much as is ever kept if max_steps does not say."""
    if config.model.num_frozen_layers == 0:
        return {}
    dpo = config.dpo
    texts = dpo.max_steps * dpo.batch_size * (2 if dpo.is_paired else 1)
    own = -(-texts // dpo.training.num_processes) * job.text_tokens * job.shape.hidden * job.numeric.width
    return {"frozen layers' output": min(own or FROZEN_STATES, FROZEN_STATES)}


def _language_model_phases(
    model: ModelConfig,
    training: TrainingConfig,
    copy: TrainedCopy,
    tokens: int,
    job: Job,
    *,
    kept: dict[str, int] | None = None,
) -> list[Phase]:
    """The phases of a stage that trains a language model on texts, in passes of at most this many tokens; kept is there in all of them."""
    shape, base = job.shape, libraries(job, training, lora=model.lora is not None)
    run = Pass(
        shape=shape,
        tokens=tokens,
        answer_tokens=tokens,
        frozen_layers=model.num_frozen_layers,
        lora=model.lora,
        training=training,
        numeric=job.numeric,
    )
    held = {"weights": copy.weights} | lost_in_loading(shape, model, job) | (kept or {})
    resident = phase("", optimizer_of(copy, training), device=held)
    return [
        phase("load", base, device=load_peak(copy, shape, model, training, job), main=whole_weights(shape, model, job)),
        *training_phases(base, resident, copy, run, job, with_logits=True),
        export_phase(base, resident, shape, model, job),
    ]


def export_phase(base: Phase, resident: Phase, shape: ModelShape, model: ModelConfig, job: Job) -> Phase:
    """The weights go to disk one after another, and the 4-bit form of a model at once."""
    main = {"a tensor": (4 + job.numeric.width) * shape.largest}
    if model.quantization:
        main["4-bit form"] = (2 if job.numeric.on_gpu else 1) * packed_bytes(shape)
    return phase("export", base, resident, device={"a tensor": 4 * shape.largest}, main=main)


def plan_reward_model(config: RewardModelStageConfig, job: Job) -> StagePlan:
    """The fine-tuned model samples for the calibration before anything else is loaded; then the reward model is trained and scores."""
    section, model, training = config.reward_model, config.model, config.reward_model.training
    shape = job.reward_shape if section.use and job.reward_shape else job.shape
    samples = section.num_calibration_samples
    vllm = samples > 0 and config.rollout.engine == "vllm"
    base = libraries(job, training, vllm=vllm, lora=model.lora is not None and not section.use)
    rows = -(-samples // training.num_processes)
    phases = [sampling_alone(job, base, config.rollout, config.sampling, rows)] if samples else []
    parameters = shape.parameters(scalar=True)
    if section.use:
        weights = {"weights": frozen_copy(parameters, training, job.numeric)}
        resident, working = phase("", device=weights), gathered(parameters, shape.largest, training, job.numeric)
        phases.append(phase("load", base, resident, device={"a tensor": 6 * shape.largest} | files(job, shape)))
    else:
        copy = model_copy(shape, model, training, job, scalar=True, earlier=int(section.init == "sft"))
        tokens = tokens_of_pass(training, section.batch_size, job.text_tokens, unit=2)
        run = Pass(
            shape=shape,
            tokens=tokens,
            answer_tokens=0,
            frozen_layers=model.num_frozen_layers,
            lora=model.lora,
            training=training,
            numeric=job.numeric,
        )
        weights = {"weights": copy.weights, "engine": copy.buffers} | lost_in_loading(shape, model, job)
        resident, working = phase("", optimizer_of(copy, training), device=weights), copy.working
        load = load_peak(copy, shape, model, training, job)
        phases += [
            phase("load", base, device=load, main=whole_weights(shape, model, job)),
            *training_phases(base, resident, replace(copy, buffers=0), run, job, with_logits=False),
        ]
    phases.append(_scoring(shape, training, base, resident, working, job))
    phases.append(export_phase(base, resident, shape, model, job))
    problem = vllm_problem(job, config.rollout, config.sampling) if samples else ""
    return replace(_plan("reward_model", training, phases, job), problem=problem)


def _scoring(
    shape: ModelShape, training: TrainingConfig, base: Phase, resident: Phase, working: int, job: Job
) -> Phase:
    """The calibration responses and held-out pairs; working is what the engine holds in a pass."""
    work = {"activations": forward_workspace(shape, max(training.microbatch_tokens, job.text_tokens), job.numeric)}
    return phase("score", base, resident, device=temporary(job, work | {"working weights": working}))


def _plan(stage: str, training: TrainingConfig, phases: list[Phase], job: Job) -> StagePlan:
    return StagePlan(
        stage=stage,
        num_processes=training.num_processes,
        on_gpu=job.numeric.on_gpu,
        phases=tuple(phases),
        beside=beside(training.num_processes),
    )
