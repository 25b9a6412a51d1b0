"""Fit the judge to human ratings that no other stage trains on, and measure its accuracy on held-out human pairs."""

from pathlib import Path

import click

from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.runtime.stage import input_artifact, output_path, stage_options, stage_run


@click.command(help=__doc__)
@input_artifact("--preferences", help="Ratings and preference pairs of the judge.")
@input_artifact("--base-model", help="Base model, whose tokenizer truncates texts as for the reward model.")
@output_path("--judge", "judge_path", help="Fitted judge: vocabulary and coefficients.")
@output_path("--metrics", help="Metrics of the stage as JSON.")
@output_path("--summary", help="Markdown report of the metrics.")
@stage_options
def main(
    preferences: Path,
    base_model: Path,
    judge_path: Path,
    metrics: Path,
    summary: Path,
    settings: str,
    tracking: str,
    executor_input: str,
) -> None:
    with stage_run(
        "judge", JudgeStageConfig, settings=settings, tracking=tracking, executor_input=executor_input
    ) as run:
        from components.judge.fit import as_markdown, fit
        from components.rlhf.artifacts.directory import open_artifact
        from components.rlhf.data.datasets import load_records, read_header
        from components.rlhf.data.records import PreferencePair, RatedText
        from components.rlhf.data.tokenizer import load_tokenizer
        from components.rlhf.rewards.reward_model import pair_accuracy

        base, data = open_artifact(base_model, "base_model"), open_artifact(preferences, "preferences")
        ratings = load_records(preferences, "ratings", RatedText)
        judge = fit(run.config.judge, ratings, load_records(preferences, "train", PreferencePair))
        pairs, max_tokens = load_records(preferences, "heldout", PreferencePair), read_header(preferences).max_tokens
        numbers = {
            "heldout_accuracy": pair_accuracy(judge, pairs, load_tokenizer(base_model), max_tokens=max_tokens),
            "num_heldout_pairs": float(len(pairs)),
            "num_ratings": float(len(ratings)),
            "num_features": float(len(judge.coefficients)),
        }
        run.write_artifact(
            "judge",
            judge_path,
            judge.save,
            kind="judge",
            parents={"base_model": base, "preferences": data},
            facts={**numbers, "judge_kind": run.config.judge.kind},
        )
        run.progress.log(f"accuracy {numbers['heldout_accuracy']:.1%} on {len(pairs)} held-out pairs")
        run.write_report("summary", summary, as_markdown(numbers, judge))
        run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.judge")
