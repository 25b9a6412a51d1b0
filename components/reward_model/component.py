"""KFP definition of reward_model."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Metrics, Model, Output

from components.container import container_spec


@dsl.container_component
def reward_model(
    base_model: Input[Model],
    sft_model: Input[Model],
    preferences: Input[Dataset],
    prompts: Input[Dataset],
    model: Output[Model],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Train the reward model on preference pairs, measure it on held-out pairs, and fix the scale of its scores.

    Args:
        base_model: Where training starts with init base.
        sft_model: Where training starts with init sft; its samples fix the scale.
        preferences: Pairs to learn from and held-out pairs.
        prompts: What the samples answer.
        model: A sequence-classification model with one output.
        metrics: Numbers of the stage.
        summary: The same for people.
        settings: Canonical JSON of RewardModelStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: where checkpoints and published models lie, and how S3 is reached.
    """
    return container_spec("reward_model", "trainer", locals())
