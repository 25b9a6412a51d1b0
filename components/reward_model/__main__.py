"""Train the reward model on preference pairs, or take an imported one; measure its accuracy, and calibrate its scores."""

from pathlib import Path

from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "reward_model",
    RewardModelStageConfig,
    reads={
        "base_model": "Base model, where training starts with init base; with reward_model.use the imported reward model.",
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
    from components.reward_model.evaluate import as_markdown, calibrate_and_measure
    from components.reward_model.imported import load_imported, scored_as
    from components.reward_model.trainer import RewardModelTrainer
    from components.rlhf.artifacts.directory import open_artifact, open_inputs
    from components.rlhf.data.datasets import load_records, read_header
    from components.rlhf.data.records import PreferencePair, Prompt, is_chat
    from components.rlhf.data.tokenizer import load_tokenizer
    from components.rlhf.engine.factory import engine_name
    from components.rlhf.engine.group import join_process_group
    from components.rlhf.models.layers import HEAD_NAME
    from components.rlhf.models.loading import save_model

    config = run.config.reward_model
    own = open_inputs(sft_model=sft_model, preferences=preferences, prompts=prompts)
    tokenizer = saved_tokenizer = load_tokenizer(sft_model)
    train, heldout = (load_records(preferences, split, PreferencePair) for split in ("train", "heldout"))
    texts = dict(
        pairs=heldout,
        prompts=load_records(prompts, "train", Prompt),
        max_tokens=read_header(preferences).max_tokens,
    )
    facts: dict[str, str | float] = {"head_name": HEAD_NAME, "padding_side": "right", "scored_as": "ids"}
    if config.use:
        inputs = own | {"imported": open_artifact(base_model, "reward_model")}
        saved_tokenizer = load_tokenizer(base_model)
        way = scored_as(saved_tokenizer, tokenizer, is_chat=any(map(is_chat, heldout)))
        run.progress.log(f"the reward model reads {'the ids of the SFT model' if way == 'ids' else 'text'}")
        model, weights = load_imported(base_model, run.config.model, way), None
        text_tokenizer = saved_tokenizer if way == "text" else None
        saved_tokenizer = text_tokenizer or tokenizer
        numbers = calibrate_and_measure(model, run.config, sft_model, tokenizer, **texts, text_tokenizer=text_tokenizer)
        facts["scored_as"] = way
    else:
        inputs = open_inputs(base_model=base_model, sft_model=sft_model, preferences=preferences, prompts=prompts)
        training = config.training
        with join_process_group(timeout_minutes=training.timeout_minutes) as group:
            # Checkpoints do not depend on the prompts, which only calibrate the trained model.
            context = run.training_context(
                run.config.checkpoint, group, *(inputs[kind] for kind in ("base_model", "sft_model", "preferences"))
            )
            trainer = RewardModelTrainer(run.config, sft_model if config.init == "sft" else base_model, context)
            numbers = trainer.train(tokenizer, train, max_tokens=texts["max_tokens"])
            numbers |= calibrate_and_measure(trainer.model, run.config, sft_model, tokenizer, **texts)
            model, weights = trainer.model, trainer.weights()
        facts["training_engine"] = engine_name(training, group)
    run.write_artifact(
        "model",
        writes["model"],
        lambda draft: save_model(model.lm, saved_tokenizer, draft, dtype=model.dtype, weights=weights),
        kind="reward_model",
        parents=inputs,
        tokenizer_of=None if facts["scored_as"] == "text" else inputs["sft_model"],
        facts={**numbers, **facts},
    )
    run.progress.log(f"accuracy on held-out human pairs: {numbers['heldout_accuracy']:.1%}")
    run.write_report("summary", writes["summary"], as_markdown(numbers))
    run.write_metrics(writes["metrics"], numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.reward_model")
