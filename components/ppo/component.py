"""KFP definition of ppo."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output


@dsl.container_component
def ppo(
    sft_model: Input[Model],
    reward_model: Input[Model],
    prompts: Input[Dataset],
    model: Output[Model],
    metrics: Output[Metrics],
    curves: Output[HTML],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Train the fine-tuned model with PPO against the reward model.

    Args:
        sft_model: Actor and reference.
        reward_model: Reward model and start of the critic.
        prompts: What is asked.
        model: The trained policy in the Hugging Face layout.
        metrics: Numbers of the stage.
        curves: Every curve of the run.
        settings: Canonical JSON of PpoStage.
        tracking: Canonical JSON of TrackingSettings.
        storage: Canonical JSON of StorageSettings: where checkpoints and published models lie, and how S3 is reached.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/rollout:0.1.0",
        command=["python", "-m", "components.ppo"],
        args=[
            "--settings",
            settings,
            "--tracking",
            tracking,
            "--sft-model",
            sft_model.path,
            "--reward-model",
            reward_model.path,
            "--prompts",
            prompts.path,
            "--model",
            model.path,
            "--metrics",
            metrics.path,
            "--curves",
            curves.path,
            "--storage",
            storage,
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )
