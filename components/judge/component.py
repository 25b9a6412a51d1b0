"""KFP definition of judge."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from components.container import container_spec


@dsl.container_component
def judge(
    preferences: Input[Dataset],
    base_model: Input[Model],
    judge: Output[Artifact],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
) -> dsl.ContainerSpec:
    """Fit the judge on human ratings that no trained stage has seen, and measure it on held-out human pairs.

    Args:
        preferences: Ratings and pairs for the judge alone.
        base_model: Its tokenizer cuts texts as the reward model sees them.
        judge: Vocabulary and coefficients.
        metrics: Numbers of the stage.
        summary: The same for people.
        settings: Canonical JSON of JudgeStageConfig.
        tracking: Canonical JSON of TrackingConfig.
    """
    return container_spec("judge", "trainer", locals())
