"""Build the judges that compare responses in the evaluation, and measure their agreement with people on held-out pairs."""

from pathlib import Path

from components.rlhf.config.judge import JudgeStageConfig, as_list
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "judge",
    JudgeStageConfig,
    reads={
        "preferences": "Ratings and preference pairs of the judges.",
        "tokenizer": "Tokenizer of the base model, which truncates texts as for the reward model.",
    },
    may_read={
        "reward_model": "Second reward model, for a judge of that kind.",
        "code": "Folder with the Python functions of judges.",
    },
    writes={
        "judge": "The judges: settings, agreement with people, and weights.",
        "metrics": "Metrics of the stage as JSON.",
        "summary": "Markdown report of the metrics.",
    },
)
def main(
    run: StageRun[JudgeStageConfig],
    preferences: Path,
    tokenizer: Path,
    reward_model: Path | None,
    code: Path | None,
    judge: Path,
    metrics: Path,
    summary: Path,
) -> None:
    from components.judge.panel import TrainingData, build_panel, metrics_of, save_panel
    from components.judge.summary import as_markdown
    from components.rlhf.artifacts.code import open_code
    from components.rlhf.artifacts.directory import open_artifact
    from components.rlhf.data.datasets import load_records, read_header
    from components.rlhf.data.records import PreferencePair, RatedText
    from components.rlhf.data.tokenizer import load_tokenizer
    from components.rlhf.rewards.judges import JudgeResources
    from components.rlhf.rewards.reward_model import as_completion

    folders = dict(tokenizer=tokenizer, preferences=preferences, reward_model=reward_model, code=code)
    parents = {kind: open_artifact(folder, kind) for kind, folder in folders.items() if folder}
    ratings = load_records(preferences, "ratings", RatedText)
    train, heldout = (load_records(preferences, split, PreferencePair) for split in ("train", "heldout"))
    encoder, max_tokens = load_tokenizer(tokenizer), read_header(preferences).max_tokens
    precision, modules = run.config.model.precision, open_code(code, run.config.code_digest)
    resources = JudgeResources(precision=precision, storage=run.storage, log=run.progress.log, code=modules)
    judges = build_panel(
        as_list(run.config.judge),
        heldout,
        lambda pair, text: as_completion(encoder, pair, text, max_tokens=max_tokens),
        TrainingData(ratings=ratings, pairs=train, reward_model=reward_model),
        resources,
        seed=run.config.seed,
    )
    numbers = metrics_of(judges)
    run.write_artifact(
        "judge",
        judge,
        lambda draft: save_panel(judges, draft),
        kind="judge",
        parents=parents,
        tokenizer_of=parents.get("reward_model"),
        facts=numbers | {"judges": ", ".join(measured.entry.settings.title for measured in judges)},
    )
    run.write_report("summary", summary, as_markdown(judges))
    run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.judge")
