"""Read, clean, split and pair the data: a data set for every stage, with no prompt in two of them."""

from functools import partial
from pathlib import Path

import click

from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.runtime.stage import input_artifact, output_path, stage_options, stage_run, storage_option


@click.command(help=__doc__)
@input_artifact("--base-model", help="Base model, whose tokenizer counts tokens and renders chat templates.")
@output_path("--demonstrations", help="Demonstrations for supervised fine-tuning.")
@output_path("--preferences", help="Preference pairs for the reward model.")
@output_path("--judge-preferences", help="Ratings and preference pairs for the judge.")
@output_path("--prompts", help="Prompts for PPO.")
@output_path("--heldout-prompts", help="Held-out prompts for evaluation.")
@output_path("--metrics", help="Metrics of the stage as JSON.")
@output_path("--summary", help="Markdown report of the datasets.")
@storage_option
@stage_options
def main(
    base_model: Path, metrics: Path, summary: Path, settings: str, tracking: str, storage: str, executor_input: str,
    **outputs: Path,
) -> None:  # fmt: skip
    with stage_run(
        "prepare_data", PrepareDataStageConfig, settings=settings, tracking=tracking, executor_input=executor_input, storage=storage,
    ) as run:  # fmt: skip
        from components.prepare_data.prepare import prepare
        from components.prepare_data.report import as_markdown, as_metrics
        from components.prepare_data.sources import download_sources
        from components.rlhf.artifacts.directory import open_artifact
        from components.rlhf.data.datasets import save_dataset
        from components.rlhf.data.tokenizer import load_tokenizer

        base = open_artifact(base_model, "base_model")
        data = run.config.data
        with download_sources(data, run.storage, run.progress.log) as local_data:
            prepared = prepare(
                local_data,
                load_tokenizer(base_model),
                seed=run.config.seed,
                num_evaluation_prompts=run.config.num_evaluation_prompts,
            )
        contents = {
            "demonstrations": (
                "demonstrations",
                {"train": prepared.demonstrations, "heldout": prepared.heldout_demonstrations},
            ),
            "preferences": ("preferences", {"train": prepared.pairs, "heldout": prepared.heldout_pairs}),
            "judge_preferences": (
                "preferences",
                {"train": prepared.judge_pairs, "ratings": prepared.judge_ratings, "heldout": prepared.heldout_pairs},
            ),
            "prompts": ("prompts", {"train": prepared.prompts, "validation": prepared.validation_prompts}),
            "heldout_prompts": ("prompts", {"heldout": prepared.heldout_prompts}),
        }
        for name, (kind, splits) in contents.items():
            sizes = {split: len(records) for split, records in splits.items()}
            run.write_artifact(
                name,
                outputs[name],
                partial(save_dataset, splits=splits, max_tokens=data.max_tokens, counts=prepared.counts.get(name, {})),
                kind=kind,
                parents={"base_model": base},
                tokenizer_of=base,
                facts={f"num_{split}": size for split, size in sizes.items()},
            )
            run.progress.log(f"{name}: {', '.join(f'{size} {split}' for split, size in sizes.items())}")
        run.write_report("summary", summary, as_markdown(prepared))
        run.write_metrics(metrics, as_metrics(prepared))


if __name__ == "__main__":
    main(prog_name="python -m components.prepare_data")
