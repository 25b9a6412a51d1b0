"""KFP definition of judge."""

from kfp import dsl
from kfp.dsl import Input, Markdown, Metrics, Output

from components.artifact_types import Judge, Preferences, Tokenizer
from components.container import container_spec


@dsl.container_component
def judge(
    preferences: Input[Preferences],
    tokenizer: Input[Tokenizer],
    judge: Output[Judge],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
) -> dsl.ContainerSpec:
    """Fit the judge to human ratings that no other stage trains on, and measure its accuracy on held-out human pairs.

    Args:
        preferences: Ratings and pairs that only the judge is trained on.
        tokenizer: Tokenizer of the base model, which truncates texts as for the reward model.
        judge: Vocabulary and coefficients of the judge.
        metrics: Metrics of the stage.
        summary: Markdown summary of the judge.
        settings: Canonical JSON of JudgeStageConfig.
        tracking: Canonical JSON of TrackingConfig.
    """
    return container_spec("judge", "trainer", locals())
