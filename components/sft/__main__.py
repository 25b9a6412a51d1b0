"""Fine-tune the base model on demonstrations; prompts carry no loss."""

from pathlib import Path

from components.rlhf.config.sft import SftStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "sft",
    SftStageConfig,
    reads={
        "base_model": "Base model, where training starts.",
        "demonstrations": "Demonstrations for training and held-out evaluation.",
    },
    writes={
        "model": "Fine-tuned model in the Hugging Face format.",
        "metrics": "Metrics of the stage as JSON.",
        "summary": "Markdown report of the metrics.",
    },
)
def main(
    run: StageRun[SftStageConfig], base_model: Path, demonstrations: Path, model: Path, metrics: Path, summary: Path
) -> None:
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.data.datasets import load_records, read_header
    from components.rlhf.data.records import Demonstration
    from components.rlhf.data.tokenizer import load_tokenizer
    from components.rlhf.engine.factory import engine_name
    from components.rlhf.engine.group import join_process_group
    from components.rlhf.models.saving import save_model
    from components.sft.trainer import SftTrainer, as_markdown

    inputs = open_inputs(base_model=base_model, demonstrations=demonstrations)
    training = run.config.sft.training
    tokenizer = load_tokenizer(base_model)
    with join_process_group(timeout_minutes=training.timeout_minutes) as group:
        context = run.training_context(run.config.checkpoint, group, *inputs.values())
        trainer = SftTrainer(run.config, base_model, context)
        numbers = trainer.train(
            tokenizer,
            load_records(demonstrations, "train", Demonstration),
            load_records(demonstrations, "heldout", Demonstration),
            max_tokens=read_header(demonstrations).max_tokens,
            folder=demonstrations,
        )
        weights = trainer.weights()
        run.write_artifact(
            "model",
            model,
            lambda draft: save_model(trainer.actor.lm, tokenizer, draft, dtype=trainer.dtype, weights=weights),
            kind="sft_model",
            parents=inputs,
            tokenizer_of=inputs["base_model"],
            facts={**numbers, "training_engine": engine_name(training, group)},
            streamed=weights,
        )
    run.progress.log(
        f"held-out loss {numbers['heldout_loss_before']:.3f} -> {numbers['heldout_loss']:.3f} nats per token"
    )
    run.write_report("summary", summary, as_markdown(numbers))
    run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.sft")
