"""KFP component of the stage ppo."""

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
    """Train the SFT model with PPO against the reward model.

    Args:
        sft_model: SFT model, the start of the actor and the reference.
        reward_model: Reward model, also the start of the critic.
        prompts: Prompts to sample responses for.
        model: Trained policy in the Hugging Face layout.
        metrics: Metrics of the last iteration.
        curves: HTML page with the curves of the training.
        settings: Canonical JSON of PpoStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: checkpoints, published models, and access to S3.
    """
    return container_spec("ppo", "rollout", locals())
