"""KFP definition of ppo."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output

from components.container import container_spec


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
        settings: Canonical JSON of PpoStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: where checkpoints and published models lie, and how S3 is reached.
    """
    return container_spec("ppo", "rollout", locals())
