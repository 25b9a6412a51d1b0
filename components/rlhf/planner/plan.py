"""The plan of a whole run: each stage in its profile, and whether it fits."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from components.rlhf.config.checks import ChecksStageConfig
from components.rlhf.config.cluster import Profile, bytes_of
from components.rlhf.config.dpo import DpoStageConfig
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.reward_model import RewardModelConfig, RewardModelStageConfig
from components.rlhf.config.sft import SftStageConfig
from components.rlhf.planner.copies import Numeric
from components.rlhf.planner.jobs import Job
from components.rlhf.planner.other_stages import (
    plan_checks,
    plan_evaluation,
    plan_import,
    plan_judge,
    plan_prepare_data,
)
from components.rlhf.planner.phases import GIB, StagePlan
from components.rlhf.planner.ppo_stage import plan_ppo
from components.rlhf.planner.shape import ModelShape
from components.rlhf.planner.training_stages import plan_dpo, plan_reward_model, plan_sft

STAGES = ("import_model", "prepare_data", "sft", "reward_model", "judge", "ppo", "dpo", "checks", "evaluation")
TIGHT = 0.9  # of what a profile has


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The models of a run. Without an imported one, reward model and judge have the shape of the base model."""

    base: ModelShape
    reward_model: ModelShape | None  # None in a run without one
    judge: ModelShape | None = None  # of a judge of kind reward_model


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a stage runs on: the profile of its pods, one on each node, or this machine."""

    gpu: bool
    gpu_memory: int | None  # of one device; None is unknown
    memory: int | None  # of the pod
    bf16: bool
    num_nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a stage fits: fits, tight, does not fit, or unknown; and the largest share of what its profile has."""

    text: str
    share: float


def machine_of(profile: Profile, precision: str) -> Machine:
    """A profile. bf16 for precision auto on a GPU; on a CPU, where it depends on the processor, fp32, which is larger."""
    gpu = profile.num_accelerators > 0
    return Machine(
        gpu=gpu,
        gpu_memory=bytes_of(profile.gpu_memory) if profile.gpu_memory else None,
        memory=bytes_of(profile.memory),
        bf16=precision == "bf16" or (precision == "auto" and gpu),
        num_nodes=profile.num_nodes,
    )


def job_of(params: Params, shapes: Shapes, machine: Machine, *, checkpoints: bool = True) -> Job:
    return Job(
        shape=shapes.base,
        reward_shape=shapes.reward_model,
        judge_shape=shapes.judge,
        numeric=Numeric(bf16=machine.bf16, on_gpu=machine.gpu),
        prompt_tokens=params.data.max_prompt_tokens,
        text_tokens=params.data.max_tokens,
        gpu_memory=machine.gpu_memory,
        checkpoints=checkpoints,
    )


def plan_stage(params: Params, shapes: Shapes, stage: str, machine: Machine, *, checkpoints: bool = True) -> StagePlan:
    """The plan of one stage on a machine."""
    plan = _plan(params, shapes, stage, job_of(params, shapes, machine, checkpoints=checkpoints))
    return replace(plan, pods=machine.num_nodes)


def _plan(params: Params, shapes: Shapes, stage: str, job: Job) -> StagePlan:
    if stage == "import_model":
        return plan_import(params.model.source, shapes.base, job)
    if stage == "prepare_data":
        return plan_prepare_data()
    if stage == "sft":
        return plan_sft(params.stage(SftStageConfig), job)
    if stage == "reward_model":
        own = params.model_copy(update={"reward_model": reward_model_section(params)})
        job = replace(job, reward_shape=job.reward_shape or job.judge_shape)
        return plan_reward_model(own.stage(RewardModelStageConfig), job)
    if stage == "judge":
        return plan_judge(params, job)
    if stage == "ppo":
        return plan_ppo(params.stage(PpoStageConfig), job)
    if stage == "dpo":
        return plan_dpo(params.stage(DpoStageConfig), job)
    if stage == "checks":
        return plan_checks(params.stage(ChecksStageConfig), job)
    return plan_evaluation(params.stage(EvaluationStageConfig), job)


def stages_of(params: Params) -> tuple[str, ...]:
    """The stages that a run has."""
    return tuple(stage for stage in STAGES if params.runs(stage))


def reward_model_section(params: Params) -> RewardModelConfig:
    """Settings of the stage reward_model: of the reward model that PPO is rewarded by, or in a run without one, of the judge's."""
    judge = params.reward_model_judge
    if params.uses_reward_model or judge is None:
        return params.reward_model
    return params.reward_model.model_copy(update={"use": judge.use, "num_calibration_samples": 0})


def plan_run(params: Params, shapes: Shapes, machine: Machine | None = None) -> dict[str, StagePlan]:
    """The plan of every stage in its profile, or all of them on one machine."""
    found = {}
    for stage in stages_of(params):
        own = machine or machine_of(params.cluster.profile(stage), params.model.precision)
        found[stage] = plan_stage(params, shapes, stage, own, checkpoints=saves_checkpoints(params))
    return found


def saves_checkpoints(params: Params) -> bool:
    storage, cluster = params.storage, params.cluster
    return bool(storage.checkpoint_uri or storage.uri or cluster.checkpoint_claim or cluster.checkpoint_volume)


def judge_plan(plan: StagePlan, machine: Machine) -> Verdict:
    """Compare a plan with what its machine has."""
    shares = []
    if plan.on_gpu and machine.gpu_memory:
        shares.append(plan.device_peak()[1] / machine.gpu_memory)
    if machine.memory:
        shares.append(plan.pod_memory() / machine.memory)
    share = max(shares, default=0.0)
    if share > 1 or plan.problem:
        return Verdict(text="does not fit", share=share)
    if plan.on_gpu and not machine.gpu_memory:
        return Verdict(text="unknown", share=share)
    return Verdict(text="tight" if share > TIGHT else "fits", share=share)


def shortfall(plan: StagePlan, machine: Machine, where: str) -> str | None:
    """What is too little, in words, or None if the stage fits. where names the machine or profile."""
    if plan.problem:
        return f"in {plan.stage} {plan.problem}"
    phase, size = plan.device_peak()
    if machine.gpu_memory and size > machine.gpu_memory:
        return (
            f"{plan.stage} needs {size / GIB:.1f} GiB on each GPU ({phase}: {_largest(plan.parts(phase))}), and {where} has "
            f"{machine.gpu_memory / GIB:.0f} GiB"
        )
    if machine.memory and plan.pod_memory() > machine.memory:
        phase, size = plan.main_peak()
        each = f" in {plan.processes_per_pod} processes of {size / GIB:.1f} GiB" if plan.processes_per_pod > 1 else ""
        return (
            f"{plan.stage} needs {plan.pod_memory() / GIB:.1f} GiB of main memory{each} ({phase}), and {where} has "
            f"{machine.memory / GIB:.1f} GiB"
        )
    return None


def _largest(parts: Mapping[str, int], count: int = 3) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in list(parts.items())[:count])
