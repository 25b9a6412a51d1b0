"""KFP definition of register."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Markdown, Model, Output

from components.container import container_spec


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
        settings: Canonical JSON of RegisterStageConfig.
        tracking: Canonical JSON of TrackingConfig.
    """
    return container_spec("register", "tools", locals())
