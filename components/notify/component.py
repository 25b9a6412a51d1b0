"""KFP definition of notify."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus


@dsl.container_component
def notify(
    status: PipelineTaskFinalStatus, settings: str, tracking: str = "{}", storage: str = "{}"
) -> dsl.ContainerSpec:
    """Say how the run ended: to MLflow and to a webhook. It runs last, whatever happened, and never fails a run.

    Args:
        status: How the run ended; Kubeflow Pipelines fills it in.
        settings: Canonical JSON of NotifyStage.
        tracking: Canonical JSON of TrackingSettings.
        storage: Canonical JSON of StorageSettings: where checkpoints lie.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/tools:0.1.0",
        command=["python", "-m", "components.notify"],
        args=["--settings", settings, "--tracking", tracking, "--storage", storage, "--status", status],
    )
