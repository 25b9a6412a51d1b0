"""Compare PPO with the fine-tuned model on held-out prompts, using a judge that PPO never sees, and decide on promotion."""

from pathlib import Path

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "evaluation",
    EvaluationStageConfig,
    reads={
        "sft_model": "Fine-tuned model, the baseline.",
        "policy": "Policy that PPO has trained.",
        "reward_model": "Reward model that PPO has trained against.",
        "judge": "Judge that compares the responses.",
        "prompts": "Held-out prompts.",
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
    reward_model: Path,
    judge: Path,
    prompts: Path,
    **writes: Path,
) -> None:
    from components.evaluation.compare import compare
    from components.evaluation.judge_curve import judge_curve
    from components.evaluation.report import as_html, as_markdown
    from components.evaluation.samples import save_comparison
    from components.evaluation.verdict import decide, summarize
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.data.datasets import load_records
    from components.rlhf.data.records import Prompt, ValidationSample
    from components.rlhf.rewards.linear import load_judge
    from components.rlhf.runtime.executor import write_parameter

    compared = dict(sft_model=sft_model, reward_model=reward_model, judge=judge)
    inputs = open_inputs(**compared, policy_model=policy, prompts=prompts)
    heldout_prompts = load_records(prompts, "heldout", Prompt)[: run.config.evaluation.num_prompts]
    comparison = compare(run.config, heldout_prompts, **compared, policy=policy, progress=run.progress)
    accuracies = {role: inputs[role].facts.get("heldout_accuracy") for role in ("judge", "reward_model")}
    accuracy = {role: float(value) for role, value in accuracies.items() if value is not None}
    numbers = summarize(comparison, run.config.evaluation, accuracy=accuracy, seed=run.config.seed)
    training = judge_curve(load_records(policy, "validation", ValidationSample), load_judge(judge))
    verdict = decide(numbers, run.config.gate)
    run.write_artifact(
        "evaluation",
        writes["evaluation"],
        lambda draft: save_comparison(comparison, numbers, training, draft),
        kind="evaluation",
        parents=inputs,
        facts={**numbers, "decision": verdict.decision, "reason": verdict.reason},
    )
    run.write_report("report", writes["report"], as_html(comparison, numbers, verdict, training, seed=run.config.seed))
    run.write_report("summary", writes["summary"], as_markdown(numbers, verdict))
    run.write_metrics(writes["metrics"], numbers)
    write_parameter(writes["decision"], verdict.decision)
    write_parameter(writes["reason"], verdict.reason)
    run.progress.log(f"{verdict.decision}: {verdict.reason}")


if __name__ == "__main__":
    main(prog_name="python -m components.evaluation")
