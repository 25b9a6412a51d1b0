"""KFP definition of judge."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Markdown, Metrics, Model, Output


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
        settings: Canonical JSON of JudgeStage.
        tracking: Canonical JSON of TrackingSettings.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/trainer:0.1.0",
        command=["python", "-m", "components.judge"],
        args=[
            "--settings",
            settings,
            "--tracking",
            tracking,
            "--preferences",
            preferences.path,
            "--base-model",
            base_model.path,
            "--judge",
            judge.path,
            "--metrics",
            metrics.path,
            "--summary",
            summary.path,
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )
