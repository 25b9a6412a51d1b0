"""Train the reward model on preference pairs, measure its held-out accuracy, and calibrate its scores."""

from pathlib import Path

import click

from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.runtime.stage import input_artifact, output_path, stage_options, stage_run, storage_option


@click.command(help=__doc__)
@input_artifact("--base-model", help="Base model, where training starts with init base.")
@input_artifact("--sft-model", help="Fine-tuned model: start of training with init sft, source of calibration samples.")
@input_artifact("--preferences", help="Preference pairs for training and held-out evaluation.")
@input_artifact("--prompts", help="Prompts of the calibration.")
@output_path("--model", "model_path", help="Reward model: a sequence-classification model with one output.")
@output_path("--metrics", help="Metrics of the stage as JSON.")
@output_path("--summary", help="Markdown report of the metrics.")
@storage_option
@stage_options
def main(
    base_model: Path, sft_model: Path, preferences: Path, prompts: Path, model_path: Path, metrics: Path, summary: Path,
    storage: str, settings: str, tracking: str, executor_input: str,
) -> None:  # fmt: skip
    with stage_run(
        "reward_model", RewardModelStageConfig, settings=settings, tracking=tracking, executor_input=executor_input, storage=storage,
    ) as run:  # fmt: skip
        from components.reward_model.evaluate import calibrate_and_measure
        from components.reward_model.trainer import RewardModelTrainer, as_markdown
        from components.rlhf.artifacts.directory import open_artifact, require_same_tokenizer
        from components.rlhf.data.datasets import load_records, read_header
        from components.rlhf.data.records import PreferencePair, Prompt
        from components.rlhf.data.tokenizer import load_tokenizer
        from components.rlhf.engine.factory import engine_name
        from components.rlhf.engine.group import join_process_group
        from components.rlhf.models.layers import HEAD_NAME
        from components.rlhf.models.loading import save_model

        folders = dict(base_model=base_model, sft_model=sft_model, preferences=preferences, prompts=prompts)
        inputs = {kind: open_artifact(path, kind) for kind, path in folders.items()}
        require_same_tokenizer(**{kind: (folders[kind], manifest) for kind, manifest in inputs.items()})
        training = run.config.reward_model.training
        start = sft_model if run.config.reward_model.init == "sft" else base_model
        tokenizer, max_tokens = load_tokenizer(sft_model), read_header(preferences).max_tokens
        with join_process_group(timeout_minutes=training.timeout_minutes) as group:
            # Checkpoints do not depend on the prompts, which only calibrate the trained model.
            context = run.training_context(
                run.config.checkpoint, group, *(inputs[kind] for kind in folders if kind != "prompts")
            )
            trainer = RewardModelTrainer(run.config, start, context)
            train, heldout = (load_records(preferences, split, PreferencePair) for split in ("train", "heldout"))
            numbers = trainer.train(tokenizer, train, max_tokens=max_tokens)
            texts = dict(pairs=heldout, prompts=load_records(prompts, "train", Prompt), max_tokens=max_tokens)
            numbers |= calibrate_and_measure(trainer.model, run.config, sft_model, tokenizer, **texts)
            weights = trainer.weights()
        run.write_artifact(
            "model",
            model_path,
            lambda draft: save_model(trainer.model.lm, tokenizer, draft, dtype=trainer.dtype, weights=weights),
            kind="reward_model",
            parents=inputs,
            tokenizer_of=inputs["sft_model"],
            facts={
                **numbers,
                "training_engine": engine_name(training, group),
                "head_name": HEAD_NAME,
                "padding_side": "right",
            },
        )
        run.progress.log(f"accuracy on held-out human pairs: {numbers['heldout_accuracy']:.1%}")
        run.write_report("summary", summary, as_markdown(numbers))
        run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.reward_model")
