"""Plans of the stages sft and reward_model."""

from dataclasses import replace

from components.rlhf.config.model import LoraConfig, ModelConfig, TrainingConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.sft import SftStageConfig
from components.rlhf.planner.activations import (
    Pass,
    backward_workspace,
    forward_workspace,
    logits,
    lost_to_adapters,
    sampling_workspace,
    saved_activations,
)
from components.rlhf.planner.constants import NF4_BYTES
from components.rlhf.planner.copies import TrainedCopy, frozen_copy, trained_copy
from components.rlhf.planner.jobs import Job, beside, libraries, optimizer_of, phase, temporary, vllm_share
from components.rlhf.planner.phases import Phase, StagePlan
from components.rlhf.planner.shape import ModelShape


def model_copy(
    shape: ModelShape, model: ModelConfig, training: TrainingConfig, job: Job, *, scalar: bool
) -> TrainedCopy:
    """A trained model of this shape: all weights that are not frozen, or adapters and a scalar head."""
    if model.lora is None:
        trained, frozen = shape.trained(model.num_frozen_layers, scalar=scalar), shape.frozen(model.num_frozen_layers)
        # The largest tensor is that of the embeddings, or of the head, which is trained with the layers.
        return trained_copy(trained, frozen, min(shape.largest, trained), training, job.numeric)
    trained = shape.adapters(model.lora.rank, model.lora.target_modules, model.num_frozen_layers)
    trained += shape.hidden if scalar else 0
    copy = trained_copy(trained, 0, min(shape.largest, trained), training, job.numeric)
    return replace(copy, weights=copy.weights + base_bytes(shape, model, job, scalar=scalar))


def quantizes(lora: LoraConfig | None) -> bool:
    """Whether the weights below the adapters are in 4 bits (QLoRA)."""
    return getattr(lora, "quantization", None) is not None


def base_bytes(shape: ModelShape, model: ModelConfig, job: Job, *, scalar: bool) -> int:
    """The frozen weights below adapters: in the computing precision, or the linear ones in 4 bits and the adapters of an earlier stage."""
    total = shape.parameters(scalar=scalar)
    if model.lora is None or not quantizes(model.lora):
        return job.numeric.width * total
    earlier = shape.adapters(model.lora.rank, model.lora.target_modules, model.num_frozen_layers)
    packed = shape.linear_parameters
    return job.numeric.width * (total - packed) + round(packed * NF4_BYTES) + 4 * earlier


def tokens_of_pass(training: TrainingConfig, rows: int, length: int, *, unit: int = 1) -> int:
    """Tokens of the largest pass: the budget, as far as a process has rows; `unit` rows, however long, always go together."""
    own = -(-rows // training.num_processes) * unit * length
    return max(min(training.microbatch_tokens, own), unit * length)


def update_parts(run: Pass, *, with_logits: bool) -> dict[str, int]:
    """Temporary tensors of a forward and backward pass."""
    parts = {"activations": saved_activations(run) + backward_workspace(run)}
    if quantizes(run.lora):  # one matrix is whole at a time
        parts["dequantized weight"] = (4 + run.numeric.width) * max(
            (m.inputs * m.outputs for m in run.shape.linears), default=0
        )
    return parts | ({"logits": logits(run.shape, run.answer_tokens, run.numeric)} if with_logits else {})


def load_peak(copy: TrainedCopy, shape: ModelShape, training: TrainingConfig, job: Job) -> dict[str, int]:
    """Weights of a loaded model, one tensor in its stored and its own precision, and the engine while it takes the weights over."""
    width = 4 if training.engine == "torch" else job.numeric.width
    parts = {"weights": copy.weights, "a tensor": (2 + width) * shape.largest}
    if not job.numeric.on_gpu:  # pages of the files that are read, which the kernel could drop
        parts["files"] = shape.stored_bytes or 2 * shape.total
    if training.engine == "deepspeed" and training.zero_stage < 3:
        parts["flat copy"] = copy.weights
    return parts


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
    training, model, shape = config.sft.training, config.model, job.shape
    base = libraries(job, training, lora=model.lora is not None)
    copy = model_copy(shape, model, training, job, scalar=False)
    tokens = tokens_of_pass(training, config.sft.batch_size, job.text_tokens)
    run = Pass(
        shape=shape,
        tokens=tokens,
        answer_tokens=tokens,
        frozen_layers=model.num_frozen_layers,
        lora=model.lora,
        training=training,
        numeric=job.numeric,
    )
    resident = phase("", optimizer_of(copy, training), device={"weights": copy.weights})
    phases = [
        phase("load", base, device=load_peak(copy, shape, training, job)),
        *training_phases(base, resident, copy, run, job, with_logits=True),
        export_phase(base, resident, shape, job),
    ]
    return _plan("sft", training, phases, job)


def export_phase(base: Phase, resident: Phase, shape: ModelShape, job: Job) -> Phase:
    """The weights go to disk one after another."""
    width = 4 + job.numeric.width
    return phase(
        "export", base, resident, device={"a tensor": 4 * shape.largest}, main={"a tensor": width * shape.largest}
    )


def plan_reward_model(config: RewardModelStageConfig, job: Job) -> StagePlan:
    training, model = config.reward_model.training, config.model
    shape = job.reward_shape if config.reward_model.use else job.shape
    base = libraries(job, training, lora=model.lora is not None)
    if config.reward_model.use:
        resident = phase("", device={"weights": frozen_copy(shape.parameters(scalar=True), None, job.numeric)})
        phases = [phase("load", base, resident, device={"a tensor": 6 * shape.largest})]
    else:
        copy = model_copy(shape, model, training, job, scalar=True)
        tokens = tokens_of_pass(training, config.reward_model.batch_size, job.text_tokens, unit=2)
        run = Pass(
            shape=shape,
            tokens=tokens,
            answer_tokens=0,
            frozen_layers=model.num_frozen_layers,
            lora=model.lora,
            training=training,
            numeric=job.numeric,
        )
        resident = phase("", optimizer_of(copy, training), device={"weights": copy.weights})
        phases = [
            phase("load", base, device=load_peak(copy, shape, training, job)),
            *training_phases(base, resident, copy, run, job, with_logits=False),
        ]
    phases.append(_calibration(config, base, resident, job))
    phases.append(_scoring(shape, training, base, resident, job))
    phases.append(export_phase(base, resident, shape, job))
    return _plan("reward_model", training, phases, job)


def _calibration(config: RewardModelStageConfig, base: Phase, resident: Phase, job: Job) -> Phase:
    """The fine-tuned model samples responses beside the trained reward model."""
    rollout = getattr(config, "rollout", None)
    samples = -(-config.reward_model.num_calibration_samples // config.reward_model.training.num_processes)
    if not samples:
        return phase("generate", base, resident)
    if rollout is not None and rollout.engine == "vllm":
        share, _ = vllm_share(job, rollout.vllm)
        return phase("generate", base, resident, device={"vLLM": share})
    work = sampling_workspace(job.shape, samples, job.prompt_tokens, config.sampling, job.numeric)
    weights = frozen_copy(job.shape.total, None, job.numeric)
    return phase("generate", base, resident, device={"weights of the sampled model": weights} | temporary(job, work))


def _scoring(shape: ModelShape, training: TrainingConfig, base: Phase, resident: Phase, job: Job) -> Phase:
    work = {"activations": forward_workspace(shape, max(training.microbatch_tokens, job.text_tokens), job.numeric)}
    return phase("score", base, resident, device=temporary(job, work))


def _plan(stage: str, training: TrainingConfig, phases: list[Phase], job: Job) -> StagePlan:
    return StagePlan(
        stage=stage,
        num_processes=training.num_processes,
        on_gpu=job.numeric.on_gpu,
        phases=tuple(phases),
        beside=beside(training.num_processes),
    )
