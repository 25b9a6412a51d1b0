"""Train the reward model on preference pairs, measure its held-out accuracy, and calibrate its scores."""

from pathlib import Path

from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "reward_model",
    RewardModelStageConfig,
    reads={
        "base_model": "Base model, where training starts with init base.",
        "sft_model": "Fine-tuned model: start of training with init sft, source of calibration samples.",
        "preferences": "Preference pairs for training and held-out evaluation.",
        "prompts": "Prompts of the calibration.",
    },
    writes={
        "model": "Reward model: a sequence-classification model with one output.",
        "metrics": "Metrics of the stage as JSON.",
        "summary": "Markdown report of the metrics.",
    },
)
def main(
    run: StageRun[RewardModelStageConfig],
    base_model: Path,
    sft_model: Path,
    preferences: Path,
    prompts: Path,
    **writes: Path,
) -> None:
    from components.reward_model.evaluate import calibrate_and_measure
    from components.reward_model.trainer import RewardModelTrainer, as_markdown
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.data.datasets import load_records, read_header
    from components.rlhf.data.records import PreferencePair, Prompt
    from components.rlhf.data.tokenizer import load_tokenizer
    from components.rlhf.engine.factory import engine_name
    from components.rlhf.engine.group import join_process_group
    from components.rlhf.models.layers import HEAD_NAME
    from components.rlhf.models.loading import save_model

    inputs = open_inputs(base_model=base_model, sft_model=sft_model, preferences=preferences, prompts=prompts)
    training = run.config.reward_model.training
    start = sft_model if run.config.reward_model.init == "sft" else base_model
    tokenizer, max_tokens = load_tokenizer(sft_model), read_header(preferences).max_tokens
    with join_process_group(timeout_minutes=training.timeout_minutes) as group:
        # Checkpoints do not depend on the prompts, which only calibrate the trained model.
        context = run.training_context(
            run.config.checkpoint, group, *(inputs[kind] for kind in ("base_model", "sft_model", "preferences"))
        )
        trainer = RewardModelTrainer(run.config, start, context)
        train, heldout = (load_records(preferences, split, PreferencePair) for split in ("train", "heldout"))
        numbers = trainer.train(tokenizer, train, max_tokens=max_tokens)
        texts = dict(pairs=heldout, prompts=load_records(prompts, "train", Prompt), max_tokens=max_tokens)
        numbers |= calibrate_and_measure(trainer.model, run.config, sft_model, tokenizer, **texts)
        weights = trainer.weights()
    run.write_artifact(
        "model",
        writes["model"],
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
    run.write_report("summary", writes["summary"], as_markdown(numbers))
    run.write_metrics(writes["metrics"], numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.reward_model")
