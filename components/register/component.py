"""KFP definition of register."""

from kfp import dsl
from kfp.dsl import Input, Markdown, Output

from components.artifact_types import Evaluation, PolicyManifest
from components.container import container_spec


@dsl.container_component
def register(
    policy: Input[PolicyManifest],
    evaluation: Input[Evaluation],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
) -> dsl.ContainerSpec:
    """Register the policy with its lineage in MLflow's model registry; a promoted version becomes the champion.

    Args:
        policy: Manifest of the trained policy.
        evaluation: Evaluation of the policy, with the decision and its reason.
        summary: Markdown report of the decision, the version and the lineage.
        settings: RegisterStageConfig as JSON.
        tracking: TrackingConfig as JSON.
    """
    return container_spec("register", "tools", locals())
