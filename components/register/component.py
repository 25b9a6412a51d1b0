"""KFP definition of register."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Markdown, Model, Output


@dsl.container_component
def register(
    policy: Input[Model],
    evaluation: Input[Artifact],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
) -> dsl.ContainerSpec:
    """Register the model with its lineage; a promoted one becomes champion, a rejected one gets a report that says why.

    Args:
        policy: The model.
        evaluation: What was decided about it.
        summary: The same for people.
        settings: Canonical JSON of RegisterStage.
        tracking: Canonical JSON of TrackingSettings.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/tools:0.1.0",
        command=["python", "-m", "components.register"],
        args=[
            "--settings",
            settings,
            "--tracking",
            tracking,
            "--policy",
            policy.path,
            "--evaluation",
            evaluation.path,
            "--summary",
            summary.path,
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )
