"""Train the SFT model on preferences with DPO, IPO, cDPO, robust DPO, SimPO or KTO."""

from pathlib import Path

from components.rlhf.config.dpo import DpoStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "dpo",
    DpoStageConfig,
    reads={
        "sft_model": "Fine-tuned model: start of the policy, and the reference.",
        "preferences": "Preference pairs (kto: labeled answers) for training, and held-out pairs.",
    },
    writes={
        "model": "Trained policy in the Hugging Face format.",
        "manifest": "Its manifest, for stages that need no weights.",
        "metrics": "Metrics of the stage as JSON.",
        "report": "HTML report with the training curves.",
    },
)
def main(run: StageRun[DpoStageConfig], sft_model: Path, preferences: Path, **writes: Path) -> None:
    from components.dpo.examples import load_examples
    from components.dpo.metrics import final_metrics
    from components.dpo.policy import save_policy
    from components.dpo.report import as_html, as_picture
    from components.dpo.trainer import DpoTrainer
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.data.datasets import read_header
    from components.rlhf.data.tokenizer import load_tokenizer
    from components.rlhf.engine.factory import engine_name
    from components.rlhf.engine.group import join_process_group

    config, training = run.config, run.config.dpo.training
    inputs = open_inputs(sft_model=sft_model, preferences=preferences)
    tokenizer, max_tokens = load_tokenizer(sft_model), read_header(preferences).max_tokens
    with join_process_group(timeout_minutes=training.timeout_minutes) as group:
        context = run.training_context(config.checkpoint, group, *inputs.values())
        examples, heldout = load_examples(config.dpo, preferences, tokenizer, max_tokens=max_tokens, context=context)
        trainer = DpoTrainer(config, sft_model, context)
        numbers = trainer.train(examples, heldout, max_tokens=max_tokens)
        numbers = final_metrics(trainer.history) | numbers
        weights = trainer.weights()
        run.write_artifact(
            "model",
            writes["model"],
            lambda draft: save_policy(trainer, tokenizer, weights, draft),
            kind="policy_model",
            parents=inputs,
            tokenizer_of=inputs["sft_model"],
            facts={**numbers, "loss_name": config.dpo.loss, "training_engine": engine_name(training, group)},
            streamed=weights,
        )
    if heldout is not None:
        run.progress.log(
            f"held-out pairs in the right order: {numbers['heldout_accuracy']:.1%}, margin {numbers['heldout_margin']:.3f}"
        )
    run.write_manifest("manifest", writes["manifest"], of="model", folder=writes["model"])
    page, picture = as_html(trainer.history, numbers, config.dpo), as_picture(trainer.history)
    run.write_report("report", writes["report"], page, picture)
    run.write_metrics(writes["metrics"], numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.dpo")
