"""KFP component of the stage ppo."""

from kfp import dsl
from kfp.dsl import HTML, Input, Metrics, Output

from components.artifact_types import Policy, PolicyManifest, Prompts, RewardModel, SftModel
from components.container import container_spec


@dsl.container_component
def ppo(
    sft_model: Input[SftModel],
    reward_model: Input[RewardModel],
    prompts: Input[Prompts],
    model: Output[Policy],
    manifest: Output[PolicyManifest],
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
        manifest: Its manifest.json, for stages that need no weights.
        metrics: Metrics of the last iteration.
        curves: HTML page with the curves of the training.
        settings: Canonical JSON of PpoStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: checkpoints, published models, and access to S3.
    """
    return container_spec("ppo", "rollout", locals())
