"""Train the SFT model with PPO against the reward model."""

from pathlib import Path

import click

from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.runtime.stage import input_artifact, output_path, stage_options, stage_run, storage_option


@click.command(help=__doc__)
@input_artifact("--sft-model", help="Fine-tuned model: actor and reference.")
@input_artifact("--reward-model", help="Reward model, which also initializes the critic.")
@input_artifact("--prompts", help="Prompts for training and validation.")
@output_path("--model", "model_path", help="Trained policy in the Hugging Face format.")
@output_path("--metrics", help="Metrics of the stage as JSON.")
@output_path("--curves", help="HTML report with the training curves.")
@storage_option
@stage_options
def main(
    sft_model: Path, reward_model: Path, prompts: Path, model_path: Path, metrics: Path, curves: Path, storage: str,
    settings: str, tracking: str, executor_input: str,
) -> None:  # fmt: skip
    with stage_run(
        "ppo", PpoStageConfig, settings=settings, tracking=tracking, executor_input=executor_input, storage=storage
    ) as run:
        from components.ppo.curves import as_html
        from components.ppo.metrics import final_metrics
        from components.ppo.models import load_models
        from components.ppo.policy import save_policy
        from components.ppo.trainer import PpoTrainer
        from components.rlhf.artifacts.directory import open_artifact, require_same_tokenizer
        from components.rlhf.data.datasets import load_records
        from components.rlhf.data.records import Prompt
        from components.rlhf.engine.factory import engine_name
        from components.rlhf.engine.group import join_process_group
        from components.rlhf.models.precision import compute_dtype

        folders = dict(sft_model=sft_model, reward_model=reward_model, prompts=prompts)
        inputs = {kind: open_artifact(path, kind) for kind, path in folders.items()}
        require_same_tokenizer(**{kind: (folders[kind], manifest) for kind, manifest in inputs.items()})
        dtype, training = compute_dtype(run.config.model.precision), run.config.ppo.training
        with join_process_group(timeout_minutes=training.timeout_minutes) as group:
            train, validation = (load_records(prompts, split, Prompt) for split in ("train", "validation"))
            models, rollout = load_models(
                run.config, sft_model, reward_model, prompts=[*train, *validation], dtype=dtype, group=group
            )
            run.progress.log(
                "all models share the frozen layers" if models.shared_trunk else "each model has its own layers"
            )
            context = run.training_context(run.config.checkpoint, group, *inputs.values())
            trainer = PpoTrainer(run.config, models, rollout, context)
            history = trainer.train(train, validation)
            weights = trainer.weights()
            rollout.close()
        numbers = final_metrics(history)
        run.write_artifact(
            "model",
            model_path,
            lambda draft: save_policy(trainer, rollout.tokenizer, weights, draft),
            kind="policy_model",
            parents=inputs,
            tokenizer_of=inputs["sft_model"],
            facts={**numbers, "training_engine": engine_name(training, group), "rollout_engine": rollout.name},
        )
        run.write_report("curves", curves, as_html(history, run.config.ppo))
        run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.ppo")
