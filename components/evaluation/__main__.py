"""Compare PPO with the fine-tuned model on held-out prompts, using a judge that PPO never sees, and decide on promotion."""

from pathlib import Path

import click

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.runtime.stage import input_artifact, output_path, stage_options, stage_run


@click.command(help=__doc__)
@input_artifact("--sft-model", help="Fine-tuned model, the baseline.")
@input_artifact("--policy", help="Policy that PPO has trained.")
@input_artifact("--reward-model", help="Reward model that PPO has trained against.")
@input_artifact("--judge", help="Judge that compares the responses.")
@input_artifact("--prompts", help="Held-out prompts.")
@output_path("--evaluation", "evaluation_path", help="Evaluation: all metrics and responses.")
@output_path("--metrics", help="Metrics of the stage as JSON.")
@output_path("--report", help="HTML report with metrics, plots and samples.")
@output_path("--summary", help="Markdown report of metrics and decision.")
@output_path("--decision", help="File for the decision, promote or reject.")
@output_path("--reason", help="File for the reason of the decision.")
@stage_options
def main(
    sft_model: Path, policy: Path, reward_model: Path, judge: Path, prompts: Path, evaluation_path: Path, metrics: Path,
    report: Path, summary: Path, decision: Path, reason: Path, settings: str, tracking: str, executor_input: str,
) -> None:  # fmt: skip
    with stage_run(
        "evaluation", EvaluationStageConfig, settings=settings, tracking=tracking, executor_input=executor_input
    ) as run:
        from components.evaluation.compare import compare
        from components.evaluation.judge_curve import judge_curve
        from components.evaluation.report import as_html, as_markdown
        from components.evaluation.samples import save_comparison
        from components.evaluation.verdict import decide, summarize
        from components.rlhf.artifacts.directory import open_artifact, require_same_tokenizer
        from components.rlhf.data.datasets import load_records
        from components.rlhf.data.records import Prompt, ValidationSample
        from components.rlhf.rewards.linear import load_judge
        from components.rlhf.runtime.executor import write_parameter

        folders = dict(
            sft_model=sft_model, policy_model=policy, reward_model=reward_model, judge=judge, prompts=prompts
        )
        inputs = {kind: open_artifact(folder, kind) for kind, folder in folders.items()}
        require_same_tokenizer(**{kind: (folders[kind], manifest) for kind, manifest in inputs.items()})
        heldout_prompts = load_records(prompts, "heldout", Prompt)[: run.config.evaluation.num_prompts]
        comparison = compare(
            run.config,
            heldout_prompts,
            sft_model=sft_model,
            policy=policy,
            reward_model=reward_model,
            judge=judge,
            progress=run.progress,
        )
        accuracies = {role: inputs[role].facts.get("heldout_accuracy") for role in ("judge", "reward_model")}
        accuracy = {role: float(value) for role, value in accuracies.items() if value is not None}
        numbers = summarize(comparison, run.config.evaluation, accuracy=accuracy, seed=run.config.seed)
        training = judge_curve(load_records(policy, "validation", ValidationSample), load_judge(judge))
        verdict = decide(numbers, run.config.gate)
        run.write_artifact(
            "evaluation",
            evaluation_path,
            lambda draft: save_comparison(comparison, numbers, training, draft),
            kind="evaluation",
            parents=inputs,
            facts={**numbers, "decision": verdict.decision, "reason": verdict.reason},
        )
        run.write_report("report", report, as_html(comparison, numbers, verdict, training, seed=run.config.seed))
        run.write_report("summary", summary, as_markdown(numbers, verdict))
        run.write_metrics(metrics, numbers)
        write_parameter(decision, verdict.decision)
        write_parameter(reason, verdict.reason)
        run.progress.log(f"{verdict.decision}: {verdict.reason}")


if __name__ == "__main__":
    main(prog_name="python -m components.evaluation")
