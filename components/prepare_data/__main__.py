"""Read, clean, split and pair the data: a data set for every stage, with no prompt in two roles."""

from functools import partial
from pathlib import Path

from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "prepare_data",
    PrepareDataStageConfig,
    reads={"tokenizer": "Tokenizer of the base model, which counts tokens and renders chat templates."},
    writes={
        "demonstrations": "Demonstrations for supervised fine-tuning.",
        "preferences": "Preference pairs for the reward model.",
        "judge_preferences": "Ratings and preference pairs for the judge.",
        "prompts": "Prompts for PPO.",
        "heldout_prompts": "Held-out prompts for evaluation.",
        "metrics": "Metrics of the stage as JSON.",
        "summary": "Markdown report of the datasets.",
        "report": "HTML report of the datasets, with examples as the model sees them.",
    },
)
def main(run: StageRun[PrepareDataStageConfig], tokenizer: Path, **writes: Path) -> None:
    from components.prepare_data.prepare import prepare
    from components.prepare_data.report import (
        as_counts,
        as_html,
        as_markdown,
        as_metrics,
        as_picture,
        log_lines,
        shown_examples,
    )
    from components.prepare_data.sources import download_sources
    from components.rlhf.artifacts.directory import open_artifact
    from components.rlhf.data.tokenizer import load_tokenizer

    base = open_artifact(tokenizer, "tokenizer")
    data = run.config.data
    loaded = load_tokenizer(tokenizer)
    with download_sources(data, run.storage, run.progress.log) as local_data:
        prepared = prepare(
            local_data,
            loaded,
            seed=run.config.seed,
            num_evaluation_prompts=run.config.num_evaluation_prompts,
        )
    for line in log_lines(prepared, data):
        run.progress.log(line)
    counts = as_counts(prepared)
    for name, (kind, splits) in prepared.data_sets().items():
        sizes = {split: len(records) for split, records in splits.items()}
        run.write_artifact(
            name,
            writes[name],
            partial(
                prepared.save,
                data_set=name,
                tokenizer=loaded,
                max_tokens=data.max_tokens,
                counts=counts.get(name, {}),
            ),
            kind=kind,
            parents={"tokenizer": base},
            tokenizer_of=base,
            facts={f"num_{split}": size for split, size in sizes.items()},
        )
        run.progress.log(f"{name}: {', '.join(f'{size} {split}' for split, size in sizes.items())}")
    examples = shown_examples(prepared, data, loaded, seed=run.config.seed)
    run.write_report("summary", writes["summary"], as_markdown(prepared, data, examples))
    page, picture = as_html(prepared, data, examples), as_picture(prepared, data)
    run.write_report("report", writes["report"], page, picture)
    run.write_metrics(writes["metrics"], as_metrics(prepared))


if __name__ == "__main__":
    main(prog_name="python -m components.prepare_data")
