"""Compare PPO with the fine-tuned model on held-out prompts, using judges that PPO never sees, and decide on promotion."""

from pathlib import Path
from typing import Any

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "evaluation",
    EvaluationStageConfig,
    reads={
        "sft_model": "Fine-tuned model, the baseline.",
        "policy": "Policy that PPO has trained.",
        "judge": "Judges that compare the responses; the first one decides.",
        "prompts": "Held-out prompts.",
    },
    may_read={
        "reward_model": "Reward model that PPO has trained against.",
        "code": "Folder with the Python functions of judges.",
    },
    writes={
        "evaluation": "Evaluation: all metrics and responses.",
        "metrics": "Metrics of the stage as JSON.",
        "report": "HTML report with metrics, plots and samples.",
        "summary": "Markdown report of metrics and decision.",
        "decision": "File for the decision, promote or reject.",
        "reason": "File for the reason of the decision.",
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
    **writes: Path,
) -> None:
    from components.evaluation.measure import measure
    from components.evaluation.report import as_html, as_markdown
    from components.evaluation.samples import save_comparison
    from components.evaluation.verdict import decide, summarize
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.runtime.executor import write_parameter

    config = run.config
    folders: Any = dict(sft_model=sft_model, reward_model=reward_model, judge=judge, code=code)
    inputs = open_inputs(**folders, policy_model=policy, prompts=prompts)
    measured = measure(run, inputs, policy=policy, prompts=prompts, **folders)
    if measured is None:  # rank 0 alone decides and writes
        return
    comparison, judges, training = measured
    accuracy = inputs["reward_model"].facts.get("heldout_accuracy") if reward_model else None
    numbers = summarize(comparison, judges, config.evaluation, reward_accuracy=accuracy, seed=config.seed)
    verdict = decide(numbers, judges[0], config.gate)
    run.write_artifact(
        "evaluation",
        writes["evaluation"],
        lambda draft: save_comparison(comparison, judges, numbers, training, draft),
        kind="evaluation",
        parents=inputs,
        facts={**numbers, "decision": verdict.decision, "reason": verdict.reason},
    )
    facts, memory = inputs["policy_model"].facts, run.memory_of(inputs)
    page = as_html(comparison, judges, numbers, verdict, training, seed=config.seed, memory=memory, policy=facts)
    run.write_report("report", writes["report"], page)
    run.write_report("summary", writes["summary"], as_markdown(numbers, judges, verdict, facts))
    run.write_metrics(writes["metrics"], numbers)
    write_parameter(writes["decision"], verdict.decision)
    write_parameter(writes["reason"], verdict.reason)
    run.progress.log(f"{verdict.decision}: {verdict.reason}")


if __name__ == "__main__":
    main(prog_name="python -m components.evaluation")
