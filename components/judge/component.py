"""KFP components of the stage judge, with and without a second reward model and code of the user."""

from kfp import dsl
from kfp.dsl import Input, Markdown, Metrics, Output

from components.artifact_types import Code, Judge, Preferences, RewardModel, Tokenizer
from components.container import container_spec, variants


def _judge(
    preferences: Input[Preferences],
    tokenizer: Input[Tokenizer],
    reward_model: Input[RewardModel],
    code: Input[Code],
    judge: Output[Judge],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Build the judges that compare responses in the evaluation, and measure their agreement with people on held-out pairs.

    Args:
        preferences: Ratings and pairs that only the judges are trained on, and held-out pairs.
        tokenizer: Tokenizer of the base model, which truncates texts as for the reward model.
        reward_model: Second reward model.
        code: Folder with the Python functions of judges.
        judge: The judges: settings, agreement with people, and weights.
        metrics: Metrics of the stage.
        summary: Markdown summary of the judges.
        settings: Canonical JSON of JudgeStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: answers of endpoint judges, and access to S3.
    """
    return container_spec("judge", "trainer", locals())


JUDGE = variants(_judge, "reward_model", "code")
judge = JUDGE[frozenset()]
