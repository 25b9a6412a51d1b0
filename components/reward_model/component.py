"""KFP component of the stage reward_model."""

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
    """Train the reward model on preference pairs, measure its held-out accuracy, and calibrate its scores.

    Args:
        base_model: Base model, where training starts with init: base.
        sft_model: SFT model, where training starts with init: sft; its samples calibrate the scores.
        preferences: Pairs to train on, and held-out pairs.
        prompts: Prompts of the calibration samples.
        model: Sequence-classification model with one output.
        metrics: Held-out accuracy and the scale of the scores.
        summary: The metrics as Markdown.
        settings: Canonical JSON of RewardModelStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: checkpoints, published models, and access to S3.
    """
    return container_spec("reward_model", "trainer", locals())
