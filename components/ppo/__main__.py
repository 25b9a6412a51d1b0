"""Train the SFT model with PPO."""

from dataclasses import replace
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
    model: Path,
    manifest: Path,
    metrics: Path,
    curves: Path,
) -> None:
    from components.ppo.curves import as_html
    from components.ppo.metrics import final_metrics
    from components.ppo.models import load_models
    from components.ppo.policy import save_policy
    from components.ppo.scoring import WeightedScorer
    from components.ppo.trainer import PpoTrainer
    from components.rlhf.artifacts.code import open_code
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.data.datasets import load_records
    from components.rlhf.data.records import Prompt
    from components.rlhf.engine.factory import engine_name
    from components.rlhf.engine.group import join_process_group
    from components.rlhf.models.precision import compute_dtype
    from components.rlhf.rewards.rewards import open_rewards

    inputs = open_inputs(sft_model=sft_model, reward_model=reward_model, prompts=prompts, code=code)
    dtype, training = compute_dtype(run.config.model.precision), run.config.ppo.training
    with join_process_group(timeout_minutes=training.timeout_minutes) as group:
        context = run.training_context(run.config.checkpoint, group, *inputs.values())
        train, validation = (load_records(prompts, split, Prompt) for split in ("train", "validation"))
        models, rollout = load_models(
            run.config, sft_model, reward_model, prompts=[*train, *validation], dtype=dtype, group=group
        )
        rewards = open_rewards(
            run.config.ppo.rewards,
            models.scorer,
            max_new_tokens=run.config.ppo.rollout.sampling.max_new_tokens,
            storage=run.storage,
            log=run.progress.log,
            code=open_code(code, run.config.code_digest),
        )
        rewards.check_prompts([*train, *validation])
        models = replace(models, scorer=WeightedScorer(rewards))
        run.progress.log(
            "all models share the frozen layers" if models.shared_trunk else "each model has its own layers"
        )
        trainer = PpoTrainer(run.config, models, rollout, context)
        history = trainer.train(train, validation)
        rollout.close()
        rewards.close()
        numbers, weights = final_metrics(history), trainer.weights()
        run.write_artifact(
            "model",
            model,
            lambda draft: save_policy(trainer, rollout.tokenizer, weights, draft),
            kind="policy_model",
            parents=inputs,
            tokenizer_of=inputs["sft_model"],
            facts={**numbers, "training_engine": engine_name(training, group), "rollout_engine": rollout.name},
            streamed=weights,
        )
    run.write_manifest("manifest", manifest, of="model", folder=model)
    run.write_report("curves", curves, as_html(history, run.config.ppo))
    run.write_metrics(metrics, numbers)


if __name__ == "__main__":
    main(prog_name="python -m components.ppo")
