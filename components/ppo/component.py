"""KFP components of the stage ppo, with and without a reward model, code of the user, and demonstrations."""

from kfp import dsl
from kfp.dsl import HTML, Input, Metrics, Output

from components.artifact_types import Code, Demonstrations, Policy, PolicyManifest, Prompts, RewardModel, SftModel
from components.container import container_spec, variants


def _ppo(
    sft_model: Input[SftModel],
    reward_model: Input[RewardModel],
    code: Input[Code],
    demonstrations: Input[Demonstrations],
    prompts: Input[Prompts],
    model: Output[Policy],
    manifest: Output[PolicyManifest],
    metrics: Output[Metrics],
    curves: Output[HTML],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Train the SFT model with PPO.

    Args:
        sft_model: SFT model, the start of the actor and the reference.
        reward_model: Reward model, also the start of the critic.
        code: Folder with the Python functions of rewards.
        demonstrations: Demonstrations whose loss is mixed into the steps of the actor (ptx_coef).
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


PPO = variants(_ppo, "reward_model", "code", "demonstrations")
ppo = PPO[frozenset({"reward_model"})]
