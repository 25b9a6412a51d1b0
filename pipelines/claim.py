"""A volume for the checkpoints of one run: a claim that the run creates, and deletes when the policies are trained.

A run that fails keeps its claim, so that Kubeflow Pipelines can retry it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes

from components.rlhf.config.cluster import Images
from components.rlhf.config.params import Params
from pipelines.access import CHECKPOINT_PATH
from pipelines.placement import TASK_LABELS, image, set_node

CLAIM_SUFFIX = "-rlhf-checkpoints"


@dsl.container_component
def open_volume() -> dsl.ContainerSpec:
    """Let every user write to a new volume, which belongs to root. KFP sets no fsGroup, which would do this."""
    return dsl.ContainerSpec(image=Images().tools, command=["chmod", "1777", CHECKPOINT_PATH])


@dataclass(frozen=True)
class CheckpointClaim:
    """The tasks that create a claim and make it writable."""

    created: Any
    opened: Any

    @property
    def name(self) -> Any:
        return self.created.outputs["name"]

    def delete(self, *, after: Sequence[Any]) -> None:
        """Add the task that deletes the claim."""
        deleted = kubernetes.DeletePVC(pvc_name=self.name).after(*after)
        deleted.set_caching_options(False).set_display_name("delete checkpoint volume")


def create_checkpoint_claim(params: Params, inputs: Mapping[str, Any]) -> CheckpointClaim:
    """Add the tasks that create the claim of a run; inputs are those of the pipeline."""
    volume = params.cluster.checkpoint_volume
    assert volume
    created = kubernetes.CreatePVC(
        access_modes=["ReadWriteOnce"],  # the training stages run one after the other
        size=volume.size,
        storage_class_name=volume.storage_class,
        pvc_name_suffix=CLAIM_SUFFIX,
    )
    created.set_caching_options(False).set_display_name("create checkpoint volume")
    opened = open_volume().set_container_image(image(params.cluster, "tools"))
    opened.set_caching_options(False).set_display_name("open checkpoint volume")
    opened.set_cpu_request("50m").set_cpu_limit("500m").set_memory_request("128Mi").set_memory_limit("128Mi")
    kubernetes.mount_pvc(opened, created.outputs["name"], CHECKPOINT_PATH)
    # On the nodes of PPO or DPO, because a volume is often created in the zone of its first pod.
    set_node(opened, params.policy.methods[0], params, inputs)
    # The owner of a folder needs no capability to change its mode.
    kubernetes.set_security_context(opened, run_as_user=0, run_as_group=0, run_as_non_root=False)
    kubernetes.set_image_pull_policy(opened, params.cluster.image_pull_policy)
    if params.cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(opened, list(params.cluster.image_pull_secrets))
    for key, value in TASK_LABELS.items():
        kubernetes.add_pod_label(opened, key, value)
    return CheckpointClaim(created, opened)
