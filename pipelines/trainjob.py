"""Stages that run as TrainJobs of Kubeflow Trainer (cluster.launcher): the pod of the task, and the plan of the job's pods.

The task keeps its component and its command. Its pod is a small one that creates the job and waits for it
(components/rlhf/trainjob). The plan travels in an annotation, as other facts of the cluster do, so that settings, digests and caches are
those of any other launcher.
"""

from typing import Any

from kfp import kubernetes

from components.rlhf.config.cluster import PROCESS_STAGES, ClusterConfig, Profile
from components.rlhf.config.params import Params
from components.rlhf.config.trainjob import (
    NAMESPACE_VARIABLE,
    PLAN_ANNOTATION,
    PLAN_VARIABLE,
    POD_VARIABLE,
    TrainJobPlan,
)
from components.rlhf.text.errors import InputError
from pipelines.access import CHECKPOINT_PATH, cluster_storage, s3_secrets_of, secrets_of
from pipelines.placement import (
    QUEUE_SECONDS,
    SCRATCH_PATH,
    SCRATCH_VARIABLES,
    TASK_LABELS,
    egress_of,
    image,
    labels_of,
    place,
    queue_label,
    role_of_image,
    set_pod,
    set_resources,
    set_retries,
    set_secrets,
    set_volumes,
    stage_label,
)
from pipelines.settings import settings_variable
from pipelines.sources import is_within

INSTALLED_RUNTIME = "rlhf"  # of manifests/components/trainjob
MAX_PLAN_CHARS = 100_000  # Linux limits a variable to 128 KiB, and Kubernetes all annotations of an object to 256 KiB
NO_SIDECAR = {"sidecar.istio.io/inject": "false"}  # a sidecar would keep the pods from completing
Object = dict[str, Any]


def configure_launcher(task: Any, stage: str, params: Params) -> Any:
    """Set the pod of a task that runs its stage as a TrainJob: a small one on the default profile, with the plan of the job's pods."""
    cluster, profile = params.cluster, params.cluster.profiles[params.cluster.default_profile]
    task.set_container_image(image(cluster, "tools"))
    fields = {
        "RLHF_RUN_ID": "metadata.labels['pipeline/runid']",
        POD_VARIABLE: "metadata.name",
        NAMESPACE_VARIABLE: "metadata.namespace",
        PLAN_VARIABLE: f"metadata.annotations['{PLAN_ANNOTATION}']",
    }
    for name, path in fields.items():
        kubernetes.use_field_path_as_env(task, env_name=name, field_path=path)
    kubernetes.add_pod_annotation(task, PLAN_ANNOTATION, plan_of(params, stage).canonical_json())
    for name, value in {**cluster.environment, **settings_variable(params)}.items():
        task.set_env_variable(name, value)
    set_pod(task, cluster, TASK_LABELS | stage_label(stage) | queue_label(profile) | profile.labels)
    set_resources(task, profile)
    place(task, profile)
    set_secrets(task, s3_secrets_of(stage, params, []))  # the pods of the job have the others
    set_volumes(task, stage, params, profile, None)
    # The time in the queue counts for this pod, and has no limit; the job has the limit of the stage.
    set_retries(task, cluster, _deadline_seconds(cluster) + QUEUE_SECONDS)
    return task.set_caching_options(False)


def require_launchable(params: Params) -> None:
    """Raise InputError if stages run as TrainJobs and something that these need is missing."""
    cluster, checkpoints = params.cluster, cluster_storage(params).checkpoint_uri or ""
    if cluster.launcher != "trainjob":
        return
    if cluster.checkpoint_volume and is_within(checkpoints, CHECKPOINT_PATH):
        raise InputError(
            "cluster.launcher is trainjob, and cluster.checkpoint_volume is a ReadWriteOnce claim, which pods on several nodes cannot "
            "mount; set storage.uri to s3://BUCKET/PREFIX, or cluster.checkpoint_claim to a ReadWriteMany claim, instead."
        )
    if not checkpoints.startswith("s3://") and not (
        cluster.checkpoint_claim and is_within(checkpoints, CHECKPOINT_PATH)
    ):
        raise InputError(
            "cluster.launcher is trainjob, whose pods exchange inputs, outputs and checkpoints through storage that all nodes share; set "
            "storage.uri to s3://BUCKET/PREFIX, or cluster.checkpoint_claim to a ReadWriteMany claim."
        )
    profile = cluster.profiles[cluster.default_profile]
    if profile.num_accelerators:
        raise InputError(
            f"cluster.default_profile is {cluster.default_profile}, which has accelerators; the tasks that wait for TrainJobs use it, so "
            "set it to a profile without, such as cpu, and name the others in cluster.stages."
        )
    if cluster.image_pull_policy != "IfNotPresent" and cluster.runtime == INSTALLED_RUNTIME:
        raise InputError(
            f"cluster.image_pull_policy is {cluster.image_pull_policy}, but a TrainJob has the one of its runtime, and {INSTALLED_RUNTIME} "
            "has IfNotPresent; remove it, or set cluster.runtime to a runtime of your own."
        )
    for stage in PROCESS_STAGES:
        if len(plan_of(params, stage).canonical_json()) > MAX_PLAN_CHARS:
            raise InputError(
                f"The pods of {stage} need more than {MAX_PLAN_CHARS:,} characters to describe, too many for an annotation; "
                "shorten cluster.environment or the labels of its profile."
            )


def plan_of(params: Params, stage: str) -> TrainJobPlan:
    """The pods of a stage's TrainJob."""
    cluster, profile = params.cluster, params.cluster.profile(stage)
    volumes, mounts = _volumes(params, profile)
    return TrainJobPlan(
        runtime=cluster.runtime,
        num_nodes=profile.num_nodes,
        image=image(cluster, role_of_image(params, stage)),
        deadline_seconds=_deadline_seconds(cluster),
        queue=profile.queue,
        resources=_resources(profile),
        environment=tuple(_environment(params, stage, profile)),
        labels=labels_of(stage, egress_of(stage, params, [])) | profile.labels,
        annotations=NO_SIDECAR,
        pod=_pod(cluster, profile) | ({"volumes": volumes} if volumes else {}),
        volume_mounts=tuple(mounts),
    )


def _deadline_seconds(cluster: ClusterConfig) -> int:
    return max(1, int(3600 * cluster.timeout_hours))


def _resources(profile: Profile) -> dict[str, str]:
    accelerators = {profile.accelerator: str(profile.num_accelerators)} if profile.num_accelerators else {}
    return {"cpu": profile.cpu, "memory": profile.pod_memory} | accelerators


def _environment(params: Params, stage: str, profile: Profile) -> list[Object]:
    scratch = {name: f"{SCRATCH_PATH}{folder}" for name, folder in SCRATCH_VARIABLES.items()} if profile.scratch else {}
    number = {"RLHF_NUM_ACCELERATORS": str(profile.num_accelerators)} if profile.num_accelerators else {}
    plain = scratch | number | dict(params.cluster.environment)
    variables: dict[str, Object] = {name: {"name": name, "value": value} for name, value in plain.items()}
    for secret in secrets_of(stage, params, []):
        for key, name in secret.variables.items():
            if secret.optional and name in plain:  # a TrainJob cannot have both, one in place of a missing key
                continue
            reference = {"name": secret.name, "key": key, "optional": secret.optional}
            variables[name] = {"name": name, "valueFrom": {"secretKeyRef": reference}}
    return list(variables.values())


def _pod(cluster: ClusterConfig, profile: Profile) -> Object:
    """Fields of the pods' spec, apart from volumes."""
    pod: Object = {}
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if cluster.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    if cluster.run_as_user is not None:
        user = cluster.run_as_user
        pod["securityContext"] = {"runAsUser": user, "runAsGroup": user, "runAsNonRoot": user != 0}
    if profile.node_selector:
        pod["nodeSelector"] = dict(profile.node_selector)
    if profile.tolerations:
        pod["tolerations"] = [toleration.model_dump(exclude_none=True) for toleration in profile.tolerations]
    if profile.node_affinity:
        pod["affinity"] = {"nodeAffinity": _node_affinity(profile)}
    return pod


def _node_affinity(profile: Profile) -> Object:
    affinity: Object = {}
    for entry in profile.node_affinity:
        term = {"matchExpressions": [_expression(e.model_dump(mode="json")) for e in entry.match_expressions]}
        if entry.weight is None:
            required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": []})
            required["nodeSelectorTerms"].append(term)
        else:
            preferred = affinity.setdefault("preferredDuringSchedulingIgnoredDuringExecution", [])
            preferred.append({"weight": entry.weight, "preference": term})
    return affinity


def _expression(expression: Object) -> Object:
    return {key: value for key, value in expression.items() if key != "values" or value}


def _volumes(params: Params, profile: Profile) -> tuple[list[Object], list[Object]]:
    """Volumes of the pods, and their mounts in the container."""
    volumes: list[Object] = []
    mounts: list[Object] = []

    def add(name: str, path: str, source: Object) -> None:
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": path})

    if profile.shared_memory:
        add("shm", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": profile.shared_memory}})
    if params.cluster.checkpoint_claim and is_within(cluster_storage(params).checkpoint_uri or "", CHECKPOINT_PATH):
        add("checkpoints", CHECKPOINT_PATH, {"persistentVolumeClaim": {"claimName": params.cluster.checkpoint_claim}})
    if profile.scratch and profile.scratch.storage_class is None:
        add("scratch", SCRATCH_PATH, {"emptyDir": {"sizeLimit": profile.scratch.size}})
    elif profile.scratch:
        spec = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": profile.scratch.storage_class,
            "resources": {"requests": {"storage": profile.scratch.size}},
        }
        add("scratch", SCRATCH_PATH, {"ephemeral": {"volumeClaimTemplate": {"spec": spec}}})
    return volumes, mounts
