"""KFP definition of notify."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus

from components.container import container_spec


@dsl.container_component
def notify(
    status: PipelineTaskFinalStatus, settings: str, tracking: str = "{}", storage: str = "{}"
) -> dsl.ContainerSpec:
    """Report the final status of the run to MLflow and a webhook. Always runs last, and never fails a run.

    Args:
        status: Final status of the run, filled in by Kubeflow Pipelines.
        settings: NotifyStageConfig as JSON.
        tracking: TrackingConfig as JSON.
        storage: StorageConfig as JSON, with the location of checkpoints.
    """
    return container_spec("notify", "tools", locals())
