"""KFP definitions of judge, without and with a second reward model.

They are two, because the backend of Kubeflow Pipelines before 2.17.1 takes every optional input artifact for missing
(kubeflow/pipelines#14175).
"""

from typing import Any

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
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Build the judges that compare responses in the evaluation, and measure their agreement with people on held-out pairs.

    Args:
        preferences: Ratings and pairs that only the judges are trained on, and held-out pairs.
        tokenizer: Tokenizer of the base model, which truncates texts as for the reward model.
        judge: The judges: settings, agreement with people, and weights.
        metrics: Metrics of the stage.
        summary: Markdown summary of the judges.
        settings: Canonical JSON of JudgeStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: answers of endpoint judges, and access to S3.
    """
    return container_spec("judge", "trainer", locals())


def _with_reward_model() -> Any:
    @dsl.container_component
    def judge(
        preferences: Input[Preferences],
        tokenizer: Input[Tokenizer],
        reward_model: Input[RewardModel],
        judge: Output[Judge],
        metrics: Output[Metrics],
        summary: Output[Markdown],
        settings: str,
        tracking: str = "{}",
        storage: str = "{}",
    ) -> dsl.ContainerSpec:
        """Build judges of which one is a second reward model; other arguments as for judge.

        Args:
            reward_model: Second reward model.
        """
        return container_spec("judge", "trainer", locals())

    return judge


judge_with_reward_model = _with_reward_model()  # a component of the same name, and so is its task
