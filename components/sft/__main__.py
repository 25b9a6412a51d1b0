"""Fine-tune the base model on demonstrations; prompts carry no loss."""

from pathlib import Path

import click

from components.rlhf.config.sft import SftStageConfig
from components.rlhf.runtime.stage import input_artifact, output_path, stage_options, stage_run, storage_option


@click.command(help=__doc__)
@input_artifact("--base-model", help="Base model, where training starts.")
@input_artifact("--demonstrations", help="Demonstrations for training and held-out evaluation.")
@output_path("--model", "model_path", help="Fine-tuned model in the Hugging Face format.")
@output_path("--metrics", help="Metrics of the stage as JSON.")
@output_path("--summary", help="Markdown report of the metrics.")
@storage_option
@stage_options
def main(
    base_model: Path, demonstrations: Path, model_path: Path, metrics: Path, summary: Path, storage: str,
    settings: str, tracking: str, executor_input: str,
) -> None:  # fmt: skip
    with stage_run(
        "sft", SftStageConfig, settings=settings, tracking=tracking, executor_input=executor_input, storage=storage
    ) as run:
        from components.rlhf.artifacts.directory import open_artifact, require_same_tokenizer
        from components.rlhf.data.datasets import load_records, read_header
        from components.rlhf.data.records import Demonstration
        from components.rlhf.data.tokenizer import load_tokenizer
        from components.rlhf.engine.factory import engine_name
        from components.rlhf.engine.group import join_process_group
        from components.rlhf.models.loading import save_model
        from components.sft.trainer import SftTrainer, as_markdown

        base, data = open_artifact(base_model, "base_model"), open_artifact(demonstrations, "demonstrations")
        require_same_tokenizer(base_model=(base_model, base), demonstrations=(demonstrations, data))
        training = run.config.sft.training
        tokenizer = load_tokenizer(base_model)
        with join_process_group(timeout_minutes=training.timeout_minutes) as group:
            context = run.training_context(run.config.checkpoint, group, base, data)
            trainer = SftTrainer(run.config, base_model, context)
            numbers = trainer.train(
                tokenizer,
                load_records(demonstrations, "train", Demonstration),
                load_records(demonstrations, "heldout", Demonstration),
                max_tokens=read_header(demonstrations).max_tokens,
            )
            weights = trainer.weights()
        run.write_artifact(
            "model",
            model_path,
            lambda draft: save_model(trainer.actor.lm, tokenizer, draft, dtype=trainer.dtype, weights=weights),
            kind="sft_model",
            parents={"base_model": base, "demonstrations": data},
            tokenizer_of=base,
            facts={**numbers, "training_engine": engine_name(training, group)},
        )
        run.progress.log(
            f"held-out loss {numbers['heldout_loss_before']:.3f} -> {numbers['heldout_loss']:.3f} nats per token"
        )
        run.write_report("summary", summary, as_markdown(numbers))
        run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.sft")
