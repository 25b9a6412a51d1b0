"""Train the SFT model with PPO."""

from pathlib import Path

from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "ppo",
    PpoStageConfig,
    reads={
        "sft_model": "Fine-tuned model: actor and reference.",
        "prompts": "Prompts for training and validation.",
    },
    may_read={
        "reward_model": "Reward model, which also initializes the critic, if it is one of the rewards.",
        "code": "Folder with the Python functions of rewards.",
        "demonstrations": "Demonstrations whose loss is mixed in, with ptx_coef.",
    },
    writes={
        "model": "Trained policy in the Hugging Face format.",
        "manifest": "Its manifest, for stages that need no weights.",
        "metrics": "Metrics of the stage as JSON.",
        "curves": "HTML report with the training curves.",
    },
)
def main(
    run: StageRun[PpoStageConfig],
    sft_model: Path,
    prompts: Path,
    reward_model: Path | None,
    code: Path | None,
    demonstrations: Path | None,
    **writes: Path,
) -> None:
    from components.ppo.curves import as_html, as_picture
    from components.ppo.guard import SAMPLES_FILE
    from components.ppo.metrics import final_metrics
    from components.ppo.policy import save_policy
    from components.ppo.setup import create_trainer
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.data.datasets import load_records
    from components.rlhf.data.records import Prompt
    from components.rlhf.engine.factory import engine_name
    from components.rlhf.engine.group import join_process_group

    config, training = run.config, run.config.ppo.training
    folders = dict(sft_model=sft_model, reward_model=reward_model, code=code, demonstrations=demonstrations)
    inputs = open_inputs(**folders, prompts=prompts)
    with join_process_group(timeout_minutes=training.timeout_minutes) as group:
        context = run.training_context(config.checkpoint, group, *inputs.values())
        train, validation = (load_records(prompts, split, Prompt) for split in ("train", "validation"))
        trainer = create_trainer(config, context, run.storage, [*train, *validation], **folders)
        history = trainer.train(train, validation)
        trainer.close()
        outcome, weights = trainer.outcome, trainer.weights()
        numbers = final_metrics(history) | outcome.numbers()
        engines = {"training_engine": engine_name(training, group), "rollout_engine": trainer.rollout.name}
        run.write_artifact(
            "model",
            writes["model"],
            lambda draft: save_policy(trainer, trainer.rollout.tokenizer, weights, draft),
            kind="policy_model",
            parents=inputs,
            tokenizer_of=inputs["sft_model"],
            facts={**numbers, **outcome.facts(), **engines},
            streamed=weights,
        )
    run.write_manifest("manifest", writes["manifest"], of="model", folder=writes["model"])
    page, picture = as_html(history, config.ppo, outcome), as_picture(history, outcome)
    run.write_report("curves", writes["curves"], page, picture)
    if outcome.events and group.rank == 0:
        run.tracker.log_file(writes["model"] / SAMPLES_FILE)
    run.write_metrics(writes["metrics"], numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.ppo")
