"""The comparison and the answers of all judges, computed by all processes of the stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.evaluation.compare import Comparison, compare
from components.evaluation.judge_curve import judge_curve
from components.evaluation.judging import Judged, judge_all, judge_by_reward_models
from components.evaluation.ranks import Ranks
from components.evaluation.rival import Rival, open_rival
from components.rlhf.artifacts.code import open_code
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.judge import as_list
from components.rlhf.config.policy import TITLES, Method
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Prompt, ValidationSample
from components.rlhf.engine.group import join_process_group
from components.rlhf.rewards.judges import JudgeResources, read_judges_of
from components.rlhf.runtime.stage import StageRun
from components.rlhf.text.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a policy."""

    comparison: Comparison
    judges: list[Judged]
    training: list[dict[str, float]]  # the judges' curve of PPO's training
    rival: Rival | None  # the evaluation of the run's other policy


def require_method(method: Method, manifest: Manifest, policy: Path) -> None:
    """Raise InputError for a policy that another method has trained: only DPO reads preferences."""
    found = "dpo" if "preferences" in manifest.parents else "ppo"
    if found != method:
        raise InputError(
            f"{policy} was trained by {TITLES[found]}, and the settings say {TITLES[method]} (method); pass the other policy, or "
            "correct method."
        )


def measure(
    run: StageRun[EvaluationStageConfig],
    inputs: Mapping[str, Manifest],
    *,
    sft_model: Path,
    policy: Path,
    reward_model: Path | None,
    judge: Path,
    code: Path | None,
    prompts: Path,
    rival: Path | None,
) -> Measured | None:
    """The comparison on held-out prompts, and what the judges say about it; None after rank 0."""
    config, entries = run.config, read_judges_of(as_list(run.config.judge), judge)
    require_method(config.method, inputs["policy_model"], policy)
    heldout = load_records(prompts, "heldout", Prompt)[: config.evaluation.num_prompts]
    # DPO samples nothing.
    validation = load_records(policy, "validation", ValidationSample) if config.method == "ppo" else []
    other = open_rival(rival, inputs["evaluation"], inputs, config, heldout) if rival else None
    resources = JudgeResources(
        precision=config.model.precision,
        storage=run.storage,
        log=run.progress.log,
        code=open_code(code, config.code_digest),
    )
    with join_process_group(timeout_minutes=config.evaluation.timeout_minutes) as group:
        run.require_agreement(group, *inputs.values())
        ranks = Ranks.of(config, group)
        comparison = compare(
            config,
            heldout,
            sft_model=sft_model,
            policy=policy,
            reward_model=reward_model,
            progress=run.progress,
            ranks=ranks,
            code=resources.code,
            sft_completions=other.sft if other else None,
        )
        asked = judge_by_reward_models(entries, judge, comparison, validation, resources, ranks)
        run.memory.observe(group)
    # The others, such as endpoints, are asked once, after all that ranks wait for each other in.
    if group.rank > 0:
        return None
    judges = judge_all(entries, judge, comparison, validation, resources, asked)
    training = judge_curve(validation, judges)
    return Measured(comparison=comparison, judges=judges, training=training, rival=other)
