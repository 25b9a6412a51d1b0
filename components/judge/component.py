"""KFP definition of judge."""

from kfp import dsl
from kfp.dsl import Input, Markdown, Metrics, Output

from components.artifact_types import Judge, Preferences, RewardModel, Tokenizer
from components.container import container_spec


@dsl.container_component
def judge(
    preferences: Input[Preferences],
    tokenizer: Input[Tokenizer],
    judge: Output[Judge],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    reward_model: Input[RewardModel] = None,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Build the judges that compare responses in the evaluation, and measure their agreement with people on held-out pairs.

    Args:
        preferences: Ratings and pairs that only the judges are trained on, and held-out pairs.
        tokenizer: Tokenizer of the base model, which truncates texts as for the reward model.
        reward_model: Second reward model, for a judge of that kind.
        judge: The judges: settings, agreement with people, and weights.
        metrics: Metrics of the stage.
        summary: Markdown summary of the judges.
        settings: Canonical JSON of JudgeStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: answers of endpoint judges, and access to S3.
    """
    return container_spec("judge", "trainer", locals(), optional=("reward_model",))
