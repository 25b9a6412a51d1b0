"""Compare a policy with the fine-tuned model on held-out prompts, using judges that it never sees, and decide on promotion."""

from pathlib import Path
from typing import Any

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "evaluation",
    EvaluationStageConfig,
    reads={
        "sft_model": "Fine-tuned model, the baseline.",
        "policy": "Policy that PPO or DPO has trained.",
        "judge": "Judges that compare the responses; the first one decides.",
        "prompts": "Held-out prompts.",
    },
    may_read={
        "reward_model": "Reward model that PPO has trained against.",
        "code": "Folder with the Python functions of judges.",
        "rival": "Evaluation of the other policy of a run with two; the responses of the fine-tuned model are taken from it.",
        "checks": "Checks beside the judge, which the policy must pass too.",
    },
    writes={
        "evaluation": "Evaluation: all metrics and responses.",
        "metrics": "Metrics of the stage as JSON.",
        "report": "HTML report with metrics, plots and samples.",
        "summary": "Markdown report of metrics and decision.",
        "decision": "File for the decision, promote or reject.",
        "reason": "File for the reason of the decision.",
        "better": "File for the method whose policy goes to the gate: ppo or dpo.",
    },
)
def main(
    run: StageRun[EvaluationStageConfig],
    sft_model: Path,
    policy: Path,
    judge: Path,
    prompts: Path,
    reward_model: Path | None,
    code: Path | None,
    rival: Path | None,
    checks: Path | None,
    **writes: Path,
) -> None:
    from components.evaluation.checked import read_checks, with_checks
    from components.evaluation.measure import measure
    from components.evaluation.outputs import write_outputs
    from components.evaluation.verdict import decide, summarize
    from components.rlhf.artifacts.directory import open_inputs

    config = run.config
    folders: Any = dict(sft_model=sft_model, reward_model=reward_model, judge=judge, code=code)
    inputs = open_inputs(**folders, policy_model=policy, prompts=prompts, evaluation=rival, checks=checks)
    rows = read_checks(checks, inputs, config)
    measured = measure(run, inputs, policy=policy, prompts=prompts, rival=rival, **folders)
    if measured is None:  # rank 0 alone decides and writes
        return
    accuracy = inputs["reward_model"].facts.get("heldout_accuracy") if reward_model else None
    judges = measured.judges
    numbers = summarize(measured.comparison, judges, config.evaluation, reward_accuracy=accuracy, seed=config.seed)
    verdict = with_checks(decide(numbers, judges[0], config.gate), rows)
    write_outputs(run, inputs, measured, numbers, verdict, rows, **writes)


if __name__ == "__main__":
    main(prog_name="python -m components.evaluation")
