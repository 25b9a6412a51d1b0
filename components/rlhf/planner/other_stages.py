"""Plans of the stages that do not train: import_model, prepare_data, judge and evaluation."""

from dataclasses import replace

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.judge import RewardModelJudge, as_list
from components.rlhf.config.model import TrainingConfig
from components.rlhf.config.params import Params
from components.rlhf.planner.activations import forward_workspace, logits, sampling_workspace
from components.rlhf.planner.constants import EVALUATION, SMALL_STAGE
from components.rlhf.planner.copies import frozen_copy
from components.rlhf.planner.jobs import Job, beside, libraries, phase, temporary, vllm_share
from components.rlhf.planner.phases import Phase, StagePlan
from components.rlhf.planner.shape import ModelShape
from components.rlhf.storage.pypi import PREFIX

MICROBATCH_TOKENS = 4096  # evaluation/compare.py and rewards/judges.py


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


def plan_judge(params: Params, job: Job, judge_shape: ModelShape | None) -> StagePlan:
    """A reward model as a judge scores held-out pairs; the other kinds hold no model."""
    judges = as_list(params.judge)
    if judge_shape is None or not any(isinstance(judge, RewardModelJudge) for judge in judges):
        phases: tuple[Phase, ...] = (Phase(name="fit", device={}, main={"libraries and records": SMALL_STAGE}),)
        return StagePlan(stage="judge", num_processes=1, on_gpu=False, phases=phases, beside=beside(1))
    weights = frozen_copy(judge_shape.parameters(scalar=True), None, job.numeric)
    work = {"activations": forward_workspace(judge_shape, max(MICROBATCH_TOKENS, job.text_tokens), job.numeric)}
    phases = (phase("score", libraries(job, None), device={"reward model": weights} | temporary(job, work)),)
    return StagePlan(
        stage="judge",
        num_processes=1,
        on_gpu=job.numeric.on_gpu,
        phases=phases,
        beside=beside(1),
    )


def plan_evaluation(config: EvaluationStageConfig, job: Job, judge_shape: ModelShape | None = None) -> StagePlan:
    """Both models sample; then both compute log-probs, the reward model scores, and the judges compare."""
    evaluation, rollout = config.evaluation, getattr(config, "rollout", None)
    processes = getattr(evaluation, "num_processes", 1)
    shards = bool(getattr(evaluation, "shard_weights", False))
    training = TrainingConfig(engine="deepspeed", zero_stage=3, num_processes=processes) if shards else None
    vllm = rollout is not None and rollout.engine == "vllm"
    several = training or TrainingConfig(num_processes=processes)
    base = phase("", libraries(job, several, vllm=vllm), main={"libraries": EVALUATION})
    weights = frozen_copy(job.shape.total, training, job.numeric)
    rows, new = -(-evaluation.num_prompts * evaluation.num_samples // processes), config.sampling.max_new_tokens
    tokens = max(min(MICROBATCH_TOKENS, rows * (job.prompt_tokens + new)), job.prompt_tokens + new)
    if vllm:
        share, _ = vllm_share(job, rollout.vllm)  # type: ignore[union-attr]
        generate = phase("generate", base, device={"vLLM": share})
    else:
        work = sampling_workspace(job.shape, rows, job.prompt_tokens, config.sampling, job.numeric)
        generate = phase("generate", base, device={"both models": 2 * weights} | temporary(job, work))
    answers = tokens * new // (job.prompt_tokens + new)
    work = {
        "activations": forward_workspace(job.shape, tokens, job.numeric),
        "logits": logits(job.shape, answers, job.numeric, copies=2),
    }
    scorers = frozen_copy(job.reward_shape.parameters(scalar=True), training, job.numeric)
    score = phase("score", base, device={"both models": 2 * weights, "reward model": scorers} | temporary(job, work))
    phases = [generate, score]
    if judge_shape is not None:
        judge = frozen_copy(judge_shape.parameters(scalar=True), None, job.numeric)
        phases.append(phase("judge", score, device={"judge": judge}))
    return StagePlan(
        stage="evaluation",
        num_processes=processes,
        on_gpu=job.numeric.on_gpu,
        phases=tuple(phases),
        beside=beside(processes),
    )
