"""Train the reward model on preference pairs, or take an imported one; measure its accuracy, and calibrate its scores."""

from pathlib import Path

from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "reward_model",
    RewardModelStageConfig,
    reads={
        "base_model": "Base model, start of training with init base; with reward_model.use the imported reward model.",
        "sft_model": "Fine-tuned model: start of training with init sft, source of calibration samples.",
        "preferences": "Preference pairs for training and held-out evaluation.",
        "prompts": "Prompts of the calibration.",
    },
    writes={
        "model": "Reward model: a sequence-classification model with one output.",
        "metrics": "Metrics of the stage as JSON.",
        "roc": "ROC curve on the held-out pairs as JSON.",
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
    from components.reward_model.calibration import sample_responses
    from components.reward_model.evaluate import write_measurements
    from components.reward_model.imported import measure_imported
    from components.reward_model.trained import train_and_measure
    from components.rlhf.artifacts.directory import open_artifact, open_inputs
    from components.rlhf.data.datasets import load_records, read_header
    from components.rlhf.data.records import PreferencePair, Prompt
    from components.rlhf.engine.group import join_process_group
    from components.rlhf.models.layers import HEAD_NAME
    from components.rlhf.models.saving import save_model

    config = run.config.reward_model
    train, heldout = (load_records(preferences, split, PreferencePair) for split in ("train", "heldout"))
    start = sft_model if config.init == "sft" else base_model
    given = dict(sft_model=sft_model, preferences=preferences, prompts=prompts)
    inputs = open_inputs(**given) if config.use else open_inputs(**given, base_model=base_model)
    if config.use:
        inputs["imported"] = open_artifact(base_model, "reward_model")
    with join_process_group(timeout_minutes=config.training.timeout_minutes) as group:
        run.require_agreement(group, *inputs.values())
        responses = sample_responses(run.config, sft_model, load_records(prompts, "train", Prompt), group)
        texts = dict(pairs=heldout, responses=responses, max_tokens=read_header(preferences).max_tokens)
        if config.use:
            result = measure_imported(base_model, run.config, sft_model, texts, run.progress.log, group)
        else:
            # Checkpoints do not depend on the prompts, which only calibrate the trained model.
            parents = [inputs[kind] for kind in ("base_model", "sft_model", "preferences")]
            context = run.training_context(run.config.checkpoint, group, *parents)
            result = train_and_measure(start, run.config, sft_model, train, texts, context, preferences)
        run.write_artifact(
            "model",
            writes["model"],
            lambda draft: save_model(
                result.model.lm, result.tokenizer, draft, dtype=result.model.dtype, weights=result.weights
            ),
            kind="reward_model",
            parents=inputs,
            tokenizer_of=None if result.facts["scored_as"] == "text" else inputs["sft_model"],
            facts={**result.numbers, **result.facts, "head_name": HEAD_NAME, "padding_side": "right"},
            streamed=result.weights or (),
        )
    write_measurements(run, result, **writes)


if __name__ == "__main__":
    main(prog_name="python -m components.reward_model")
