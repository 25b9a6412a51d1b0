"""Fit the judge to human ratings that no other stage trains on, and measure its accuracy on held-out human pairs."""

from pathlib import Path

from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "judge",
    JudgeStageConfig,
    reads={
        "preferences": "Ratings and preference pairs of the judge.",
        "tokenizer": "Tokenizer of the base model, which truncates texts as for the reward model.",
    },
    writes={
        "judge": "Fitted judge: vocabulary and coefficients.",
        "metrics": "Metrics of the stage as JSON.",
        "summary": "Markdown report of the metrics.",
    },
)
def main(
    run: StageRun[JudgeStageConfig], preferences: Path, tokenizer: Path, judge: Path, metrics: Path, summary: Path
) -> None:
    from components.judge.fit import as_markdown, fit
    from components.rlhf.artifacts.directory import open_artifact
    from components.rlhf.data.datasets import load_records, read_header
    from components.rlhf.data.records import PreferencePair, RatedText
    from components.rlhf.data.tokenizer import load_tokenizer
    from components.rlhf.rewards.reward_model import pair_accuracy

    base, data = open_artifact(tokenizer, "tokenizer"), open_artifact(preferences, "preferences")
    ratings = load_records(preferences, "ratings", RatedText)
    fitted = fit(run.config.judge, ratings, load_records(preferences, "train", PreferencePair))
    pairs, max_tokens = load_records(preferences, "heldout", PreferencePair), read_header(preferences).max_tokens
    numbers = {
        "heldout_accuracy": pair_accuracy(fitted, pairs, load_tokenizer(tokenizer), max_tokens=max_tokens),
        "num_heldout_pairs": float(len(pairs)),
        "num_ratings": float(len(ratings)),
        "num_features": float(len(fitted.coefficients)),
    }
    run.write_artifact(
        "judge",
        judge,
        fitted.save,
        kind="judge",
        parents={"tokenizer": base, "preferences": data},
        facts={**numbers, "judge_kind": run.config.judge.kind},
    )
    run.progress.log(f"accuracy {numbers['heldout_accuracy']:.1%} on {len(pairs)} held-out pairs")
    run.write_report("summary", summary, as_markdown(numbers, fitted))
    run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.judge")
