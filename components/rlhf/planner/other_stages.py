"""Plans of the stages that do not train: import_model, prepare_data, judge, checks and evaluation."""

from dataclasses import replace

from components.rlhf.config.checks import ChecksStageConfig, LmEvalCheck, PromptsCheck
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.judge import RewardModelJudge, as_list
from components.rlhf.config.model import TrainingConfig
from components.rlhf.config.params import Params
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.planner.activations import forward_workspace, kl_logits
from components.rlhf.planner.constants import EVALUATION, SMALL_STAGE
from components.rlhf.planner.copies import frozen_copy, gathered, shards_weights
from components.rlhf.planner.jobs import Job, beside, files, libraries, phase, sampling_alone, temporary, vllm_problem
from components.rlhf.planner.phases import Phase, StagePlan
from components.rlhf.planner.shape import ModelShape
from components.rlhf.storage.pypi import PREFIX

MICROBATCH_TOKENS = 4096  # evaluation/compare.py, checks/perplexity.py and rewards/judges.py


def plan_import(source: str, shape: ModelShape, job: Job) -> StagePlan:
    """The model in fp32 beside the pages of the files that it is read from; of a GGUF file another fp32 copy."""
    main = {"libraries": libraries(_on_cpu(job), None).main["libraries"], "weights": 4 * shape.total}
    read = {"files": shape.stored_bytes or 2 * shape.total}
    if source.startswith(PREFIX):
        read = {"dequantized weights": 4 * shape.total}
    phases = [
        Phase(name="load", device={}, main=main | read),
        Phase(name="export", device={}, main=main | {"a tensor": 6 * shape.largest}),
    ]
    return StagePlan(stage="import_model", num_processes=1, on_gpu=False, phases=tuple(phases), beside=beside(1))


def _on_cpu(job: Job) -> Job:
    return replace(job, numeric=replace(job.numeric, on_gpu=False))


def plan_prepare_data() -> StagePlan:
    """What it holds depends on the data, which are not read here."""
    phases = (Phase(name="read", device={}, main={"libraries and records": SMALL_STAGE}),)
    note = "depends on the data: the size is that of some tens of thousands of records"
    return StagePlan(
        stage="prepare_data", num_processes=1, on_gpu=False, phases=phases, beside=beside(1), notes=(note,)
    )


def plan_judge(params: Params, job: Job) -> StagePlan:
    """A reward model as a judge scores held-out pairs; the other kinds hold no model."""
    judges = as_list(params.judge)
    if job.judge_shape is None or not any(isinstance(judge, RewardModelJudge) for judge in judges):
        phases: tuple[Phase, ...] = (Phase(name="fit", device={}, main={"libraries and records": SMALL_STAGE}),)
        return StagePlan(stage="judge", num_processes=1, on_gpu=False, phases=phases, beside=beside(1))
    phases = (_scorer("score", job.judge_shape, libraries(job, None), None, job.text_tokens, job),)
    return StagePlan(
        stage="judge",
        num_processes=1,
        on_gpu=job.numeric.on_gpu,
        phases=phases,
        beside=beside(1),
    )


def plan_checks(config: ChecksStageConfig, job: Job) -> StagePlan:
    """One process, with one of the two models at a time: it samples, and computes the log-probs of texts and of the harness's samples."""
    base = phase("", libraries(job, None), main={"libraries": EVALUATION})
    weights = {"one model": frozen_copy(job.shape.total, None, job.numeric)}
    work = {"activations": forward_workspace(job.shape, max(MICROBATCH_TOKENS, job.text_tokens), job.numeric)}
    rows = [len(check.prompts) for check in config.checks if isinstance(check, PromptsCheck)]
    phases = [phase("perplexity", base, device=weights | temporary(job, work))]
    if rows:
        phases.append(sampling_alone(job, base, EngineConfig(), config.sampling, max(rows)))
    batches = [check.batch_size for check in config.checks if isinstance(check, LmEvalCheck)]
    if batches:  # the harness keeps all logits of a batch, and their log-softmax in fp32
        logits = max(batches) * job.text_tokens * job.shape.vocab * (job.numeric.width + 4)
        phases.append(phase("lm_eval", base, device=weights | temporary(job, work | {"logits": logits})))
    return StagePlan(
        stage="checks",
        num_processes=1,
        on_gpu=job.numeric.on_gpu,
        phases=tuple(phases),
        beside=beside(1),
        notes=("its tasks of lm-evaluation-harness are planned with texts as long as the data's",) if batches else (),
    )


def plan_evaluation(config: EvaluationStageConfig, job: Job) -> StagePlan:
    """One after the other: an engine samples from both models, both compute the KL, the reward model scores, and each judge compares."""
    evaluation, rollout = config.evaluation, config.rollout
    training = _frozen_training(config)
    vllm = rollout.engine == "vllm"
    base = phase("", libraries(job, training, vllm=vllm), main={"libraries": EVALUATION})
    rows = -(-evaluation.num_prompts * evaluation.num_samples // evaluation.num_processes)
    length = job.prompt_tokens + config.longest_sampling.max_new_tokens
    phases = [
        sampling_alone(job, base, rollout, config.longest_sampling, rows, in_turns=config.environment is not None),
        *_kl(config, job, base, training, tokens=max(min(MICROBATCH_TOKENS, rows * length), length)),
    ]
    if job.reward_shape is not None:
        phases.append(_scorer("score", job.reward_shape, base, training, length, job))
    if job.judge_shape is not None:
        phases.append(_scorer("judge", job.judge_shape, base, training, length, job))
    return StagePlan(
        stage="evaluation",
        num_processes=evaluation.num_processes,
        on_gpu=job.numeric.on_gpu,
        phases=tuple(phases),
        beside=beside(evaluation.num_processes),
        problem=vllm_problem(job, rollout, config.longest_sampling),
    )


def _frozen_training(config: EvaluationStageConfig) -> TrainingConfig:
    """How models are loaded that compute and are not trained (evaluation/ranks.py)."""
    processes = config.evaluation.num_processes
    if config.evaluation.shard_weights and processes > 1:
        return TrainingConfig(engine="deepspeed", zero_stage=3, num_processes=processes)
    return TrainingConfig(num_processes=processes)


def _kl(config: EvaluationStageConfig, job: Job, base: Phase, training: TrainingConfig, *, tokens: int) -> list[Phase]:
    """Both models are loaded, share their frozen layers unless they are sharded, and compute logits of the same tokens."""
    shape, new = job.shape, config.longest_sampling.max_new_tokens
    both = 2 * frozen_copy(shape.total, training, job.numeric)
    shared = 0 if shards_weights(training) else job.numeric.width * shape.frozen(config.model.num_frozen_layers)
    work = {
        "activations": forward_workspace(shape, tokens, job.numeric),
        "working weights": 2 * gathered(shape.total, shape.largest, training, job.numeric),
    }
    # Pieces of logits have one size, so that a heap takes the same memory for all of them.
    answers = tokens * new // (job.prompt_tokens + new)
    pieces = {"logits": kl_logits(shape, answers, job.numeric, config.longest_sampling)}
    reading = {"a tensor": (2 + job.numeric.width) * shape.largest} | files(job, shape)
    return [
        phase("load", base, device={"both models": both} | reading),
        phase("KL", base, device={"both models": both - shared} | temporary(job, work) | pieces),
    ]


def _scorer(name: str, shape: ModelShape, base: Phase, training: TrainingConfig | None, length: int, job: Job) -> Phase:
    """A reward model, or its shard, that scores texts of at most this many tokens."""
    parameters = shape.parameters(scalar=True)
    work = {
        "activations": forward_workspace(shape, max(MICROBATCH_TOKENS, length), job.numeric),
        "working weights": gathered(parameters, shape.largest, training, job.numeric),
    }
    weights = {"reward model": frozen_copy(parameters, training, job.numeric)}
    return phase(name, base, device=weights | temporary(job, work))
