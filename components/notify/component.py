"""KFP definition of notify."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus

from components.container import container_spec


@dsl.container_component
def notify(
    status: PipelineTaskFinalStatus, settings: str, tracking: str = "{}", storage: str = "{}"
) -> dsl.ContainerSpec:
    """Say how the run ended: to MLflow and to a webhook. It runs last, whatever happened, and never fails a run.

    Args:
        status: How the run ended; Kubeflow Pipelines fills it in.
        settings: Canonical JSON of NotifyStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: where checkpoints lie.
    """
    return container_spec("notify", "tools", locals())
