"""What a task that launches a stage as a TrainJob gets from the platform: the pods of the job, without the stage's arguments."""

from typing import Any

from pydantic import Field

from components.rlhf.config.base import BaseConfig, PositiveInt

# The platform writes the plan into an annotation of the task's pod, and from there into this environment variable: it is no setting
# of the stage, so that digests and caches do not depend on it.
PLAN_VARIABLE, PLAN_ANNOTATION = "RLHF_TRAINJOB", "kfp-rlhf/trainjob"
POD_VARIABLE, NAMESPACE_VARIABLE = "RLHF_POD_NAME", "RLHF_POD_NAMESPACE"  # of the task
DIGEST_VARIABLE = "RLHF_TRAINJOB_DIGEST"  # of the pods of a job: the digest of its specification
CONTAINER = "node"  # name of the replicated job and of the container, fixed by Kubeflow Trainer


class TrainJobPlan(BaseConfig):
    """The pods of one stage."""

    runtime: str
    """Name of the TrainingRuntime."""
    num_nodes: PositiveInt
    """Number of pods."""
    image: str
    """Image of the stage."""
    deadline_seconds: PositiveInt
    """Time limit of one attempt, without the time in a queue."""
    queue: str | None = None
    """Kueue LocalQueue of the job."""
    resources: dict[str, str]
    """Requests and limits of each pod."""
    environment: tuple[dict[str, Any], ...] = ()
    """Environment variables as in a pod: name with value, or with valueFrom."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the pods."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the pods."""
    pod: dict[str, Any] = Field(default_factory=dict)
    """Fields of the pods' spec: node selector, tolerations, affinity, volumes, security context, image pull secrets."""
    volume_mounts: tuple[dict[str, Any], ...] = ()
    """Volume mounts of the container."""
