"""KFP component of the stage reward_model."""

from kfp import dsl
from kfp.dsl import Artifact, ClassificationMetrics, Input, Markdown, Metrics, Output

from components.artifact_types import Preferences, Prompts, RewardModel, SftModel
from components.container import container_spec


@dsl.container_component
def reward_model(
    base_model: Input[Artifact],
    sft_model: Input[SftModel],
    preferences: Input[Preferences],
    prompts: Input[Prompts],
    model: Output[RewardModel],
    metrics: Output[Metrics],
    roc: Output[ClassificationMetrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Train the reward model on preference pairs, measure its held-out accuracy, and calibrate its scores.

    Settings whose calibration samples with vLLM need the image rollout (set_container_image).

    Args:
        base_model: Base model, where training starts with init: base, or an imported reward model.
        sft_model: SFT model, where training starts with init: sft; its samples calibrate the scores.
        preferences: Pairs to train on, and held-out pairs.
        prompts: Prompts of the calibration samples.
        model: Sequence-classification model with one output.
        metrics: Held-out accuracy and the scale of the scores.
        roc: ROC curve on the held-out pairs: right order or wrong order by the margin of the scores.
        summary: The metrics as Markdown.
        settings: Canonical JSON of RewardModelStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: checkpoints, published models, and access to S3.
    """
    return container_spec("reward_model", "trainer", locals())
