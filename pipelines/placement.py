"""What the platform gives to each task of the DAG (dag.py): image, node, memory, secrets, volumes, retries."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kfp import kubernetes

from components.rlhf.config.cluster import (
    PROCESS_STAGES,
    STAGES,
    ClusterConfig,
    Profile,
    Scratch,
    has_digest,
)
from components.rlhf.config.params import Params
from components.rlhf.config.trainjob import NAMESPACE_VARIABLE
from components.rlhf.storage.pypi import PREFIX
from components.rlhf.text.errors import InputError
from pipelines.access import CHECKPOINT_PATH, SecretVariables, cluster_storage, keeps_files, secrets_of
from pipelines.settings import settings_variable
from pipelines.sources import data_sources, is_remote, is_within

if TYPE_CHECKING:
    from pipelines.claim import CheckpointClaim

IMAGE_OF = {
    "import_model": "trainer",
    "prepare_data": "trainer",
    "import_code": "tools",
    "sft": "trainer",
    "reward_model": "trainer",
    "judge": "trainer",
    "ppo": "rollout",
    "dpo": "trainer",
    "checks": "trainer",
    "evaluation": "rollout",
    "register": "tools",
    "notify": "tools",
}
DOWNLOADING_STAGES = ("import_model", "prepare_data")  # the only stages that download models and data
DETERMINISTIC_STAGES = (*DOWNLOADING_STAGES, "import_code", "judge")
SCRATCH_PATH = "/scratch"
# The images keep these in /tmp, where KFP's launcher writes too, which a volume that belongs to root would prevent.
SCRATCH_VARIABLES = {"TMPDIR": "", "XDG_CACHE_HOME": "/.cache", "HF_HOME": "/.cache/huggingface", "TRITON_CACHE_DIR": "/.cache/triton",
                     "TORCHINDUCTOR_CACHE_DIR": "/.cache/inductor", "TORCH_EXTENSIONS_DIR": "/.cache/torch_extensions"}  # fmt: skip
BACKOFF_SECONDS = 60
# KFP's backoff_max_duration is the time since the start of the first attempt after which Argo retries nothing. It includes
# the time that pods wait for a node, which has no limit here.
QUEUE_SECONDS = 365 * 24 * 3600
# The network policies of manifests/ select tasks by these labels.
TASK_LABELS = {"app.kubernetes.io/part-of": "kfp-rlhf"}
HUB_LABELS, ENDPOINT_LABELS = {"kfp-rlhf/egress": "hub"}, {"kfp-rlhf/egress": "endpoint"}
NUM_ACCELERATORS_ANNOTATION = "kfp-rlhf/num-accelerators"
PROCESS_GROUP_LABELS = {"kfp-rlhf/process-group": "true"}


def configure_task(
    task: Any,
    stage: str,
    params: Params,
    *,
    source: str = "",
    inputs: Mapping[str, Any] | None = None,
    claim: "CheckpointClaim | None" = None,
) -> Any:
    """Set image, node, resources, secrets, volumes, retries and caching of a task.

    source is what a task of import_model or import_code reads. inputs are the inputs of the pipeline by name; those of node_inputs()
    replace the node selector and tolerations of a profile. claim is the one that this run creates for its checkpoints.
    """
    cluster, profile = params.cluster, params.cluster.profile(stage)
    sources = [source] if source else data_sources(params) if stage == "prepare_data" else []
    task.set_container_image(image(cluster, role_of_image(params, stage)))
    kubernetes.use_field_path_as_env(task, env_name="RLHF_RUN_ID", field_path="metadata.labels['pipeline/runid']")
    for name, value in _environment(cluster, stage).items():
        task.set_env_variable(name, value)
    if stage != "notify":  # which gets all settings as an argument; an argument of the others would spoil KFP's cache
        for name, value in settings_variable(params).items():
            task.set_env_variable(name, value)
    if stage == "notify" and cluster.launcher == "trainjob":  # which deletes jobs that the run has left
        kubernetes.use_field_path_as_env(task, env_name=NAMESPACE_VARIABLE, field_path="metadata.namespace")
    egress = egress_of(stage, params, sources)
    set_pod(task, cluster, labels_of(stage, egress) | queue_label(profile) | profile.labels)
    set_resources(task, profile)
    if profile.num_accelerators and IMAGE_OF[stage] != "tools":  # which has no torch to look for them
        _tell_num_accelerators(task, profile)
    set_node(task, stage, params, inputs or {})
    set_secrets(task, secrets_of(stage, params, sources))
    set_volumes(task, stage, params, profile, claim)
    set_retries(task, cluster, int(3600 * (cluster.timeout_hours + waiting_hours(stage, params))))
    return task.set_caching_options(egress != ENDPOINT_LABELS and _may_cache(stage, cluster, profile, sources))


def role_of_image(params: Params, stage: str) -> str:
    """The role of the image of a stage: that of IMAGE_OF, or the one with vLLM where the settings need it."""
    return "rollout" if stage == "reward_model" and params.calibrates_with_vllm else IMAGE_OF[stage]


def image(cluster: ClusterConfig, role: str) -> str:
    """The image of a role, with the registry mirror in front if one is set and the name has no registry."""
    name: str = getattr(cluster.images, role)
    host = name.split("/")[0]
    has_registry = "/" in name and ("." in host or ":" in host or host == "localhost")
    return name if has_registry or not cluster.mirrors.registry else f"{cluster.mirrors.registry.rstrip('/')}/{name}"


def require_digests(cluster: ClusterConfig) -> None:
    """Raise InputError for an image without a digest if cluster.require_digests is true."""
    for role in sorted(set(IMAGE_OF.values())):
        name = getattr(cluster.images, role)
        if cluster.require_digests and not has_digest(name):
            raise InputError(
                f"cluster.images.{role} is {name}, which has no digest, and cluster.require_digests is true; "
                "set it to NAME@sha256:DIGEST."
            )


def input_names(profile: str) -> tuple[str, str]:
    """Names of the pipeline inputs with the node selector and the tolerations of a profile."""
    name = re.sub(r"\W", "_", profile).lower()
    return f"node_selector_{name}", f"tolerations_{name}"


def node_inputs(params: Params) -> dict[str, Any]:
    """Names and defaults of the pipeline inputs that place the stages with accelerators, two for each of their profiles.

    Raises InputError for two profiles whose names give the same input.
    """
    cluster, inputs, profiles = params.cluster, {}, {}
    for stage in STAGES:
        name, profile = cluster.profile_name(stage), cluster.profile(stage)
        if not profile.num_accelerators or cluster.launches(stage) or not params.runs(stage):  # whose plan has the node
            continue
        selector, tolerations = input_names(name)
        if profiles.setdefault(selector, name) != name:
            raise InputError(
                f"cluster.profiles: {profiles[selector]} and {name} are one name as an input of the pipeline ({selector}); rename one."
            )
        inputs[selector] = dict(profile.node_selector)
        inputs[tolerations] = [t.model_dump(exclude_none=True) for t in profile.tolerations]
    return inputs


def require_checkpoints_for_budget(params: Params) -> None:
    """Raise InputError for a run with a budget that would save no checkpoints, where it also keeps what it has spent."""
    if params.cluster.budget is not None and not cluster_storage(params).checkpoint_uri:
        raise InputError(
            f"cluster.budget is {params.cluster.budget:g}, but no checkpoints are saved, and a run that stops at its budget would lose "
            "everything; set storage.uri to s3://BUCKET/PREFIX, cluster.checkpoint_claim or cluster.checkpoint_volume."
        )


def require_place_for_approval(params: Params) -> None:
    """Raise InputError for a run on a cluster that would wait for a person where nobody can answer."""
    if params.gate.approval == "required" and not params.tracking.enabled:
        raise InputError(
            "gate.approval is required, but tracking.enabled is false, and on a cluster people answer in MLflow; set it to true, or "
            "gate.approval to none."
        )


def require_allowed_code(params: Params) -> None:
    """Raise InputError for programs of the user in a run on a cluster, unless cluster.allow_user_code says so."""
    found = params.runs_user_code
    if found and not params.cluster.allow_user_code:
        key, kind = next(iter(found.items()))
        raise InputError(
            f"{key} is a {kind}, a program of yours that would run on the cluster, and cluster.allow_user_code is false; set it to true "
            "if your cluster may run such code."
        )


def uses_checkpoint_volume(params: Params) -> bool:
    """Whether each run creates a claim for its checkpoints."""
    return bool(params.cluster.checkpoint_volume) and is_within(
        cluster_storage(params).checkpoint_uri or "", CHECKPOINT_PATH
    )


def _environment(cluster: ClusterConfig, stage: str) -> dict[str, str]:
    mirrors = {"PIP_INDEX_URL": cluster.mirrors.pypi, "HF_ENDPOINT": cluster.mirrors.hub}
    variables = {name: value for name, value in mirrors.items() if value and stage in DOWNLOADING_STAGES}
    return variables | dict(cluster.environment)


def set_pod(task: Any, cluster: ClusterConfig, labels: Mapping[str, str]) -> None:
    """Labels, pull policy and user of the pod of a task."""
    for key, value in labels.items():
        kubernetes.add_pod_label(task, key, value)
    kubernetes.set_image_pull_policy(task, cluster.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    if cluster.run_as_user is not None:
        user = cluster.run_as_user
        kubernetes.set_security_context(task, run_as_user=user, run_as_group=user, run_as_non_root=user != 0)


def labels_of(stage: str, egress: Mapping[str, str]) -> dict[str, str]:
    """Labels of the pods of a stage, by which network policies select them."""
    group = PROCESS_GROUP_LABELS if stage in PROCESS_STAGES else {}
    return {**TASK_LABELS, **stage_label(stage), **egress, **group}


def egress_of(stage: str, params: Params, sources: list[str]) -> dict[str, str]:
    """The label that opens the network to the pods of a stage: to the hub and the index of packages, or to endpoints."""
    if any(map(is_remote, sources)):
        return HUB_LABELS
    return ENDPOINT_LABELS if params.asked_by(stage) else {}


def stage_label(stage: str) -> dict[str, str]:
    return {"kfp-rlhf/stage": stage.replace("_", "-")}


def queue_label(profile: Profile) -> dict[str, str]:
    return {"kueue.x-k8s.io/queue-name": profile.queue} if profile.queue else {}


def _tell_num_accelerators(task: Any, profile: Profile) -> None:
    """Through an annotation, because a local run sets the variables of a task too, and has other accelerators."""
    kubernetes.add_pod_annotation(task, NUM_ACCELERATORS_ANNOTATION, str(profile.num_accelerators))
    path = f"metadata.annotations['{NUM_ACCELERATORS_ANNOTATION}']"
    kubernetes.use_field_path_as_env(task, env_name="RLHF_NUM_ACCELERATORS", field_path=path)


def set_resources(task: Any, profile: Profile) -> None:
    """CPUs, memory, accelerators and /dev/shm of a task."""
    task.set_cpu_request(profile.cpu).set_cpu_limit(profile.cpu)
    task.set_memory_request(profile.pod_memory).set_memory_limit(profile.pod_memory)
    if profile.num_accelerators:
        task.set_accelerator_type(profile.accelerator).set_accelerator_limit(profile.num_accelerators)
    if profile.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=profile.shared_memory)


def set_retries(task: Any, cluster: ClusterConfig, timeout: int) -> None:
    """Time limit of one attempt in seconds, and retries."""
    kubernetes.set_timeout(task, timeout)
    retries = cluster.num_retries
    if retries:
        waits = BACKOFF_SECONDS * (2**retries - 1)
        limit = (retries + 1) * timeout + waits + QUEUE_SECONDS
        task.set_retry(
            retries, backoff_duration=f"{BACKOFF_SECONDS}s", backoff_factor=2.0, backoff_max_duration=f"{limit}s"
        )


def waiting_hours(stage: str, params: Params) -> float:
    """The hours for which a stage may wait for a person."""
    return params.gate.approval_hours if stage == "register" and params.gate.approval == "required" else 0.0


def set_node(task: Any, stage: str, params: Params, inputs: Mapping[str, Any]) -> None:
    """Place a task on the nodes of a stage: by inputs of the pipeline if its profile has them, else by the profile."""
    profile = params.cluster.profile(stage)
    selector, tolerations = input_names(params.cluster.profile_name(stage))
    if selector in inputs:
        kubernetes.add_node_selector_json(task, inputs[selector])
        kubernetes.add_toleration_json(task, inputs[tolerations])
        profile = profile.model_copy(update={"node_selector": {}, "tolerations": ()})
    place(task, profile)


def place(task: Any, profile: Profile) -> None:
    """Place a task on the nodes of a profile."""
    for key, value in profile.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in profile.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    for affinity in profile.node_affinity:
        expressions = [e.model_dump(mode="json") for e in affinity.match_expressions]
        kubernetes.add_node_affinity(task, match_expressions=expressions, weight=affinity.weight)


def set_secrets(task: Any, secrets: Iterable[SecretVariables]) -> None:
    """Give Secrets to a task as environment variables."""
    for secret in secrets:
        kubernetes.use_secret_as_env(
            task, secret_name=secret.name, secret_key_to_env=dict(secret.variables), optional=secret.optional
        )


def set_volumes(task: Any, stage: str, params: Params, profile: Profile, claim: "CheckpointClaim | None") -> None:
    """Mount checkpoints, data and scratch."""
    cluster, checkpoints = params.cluster, cluster_storage(params).checkpoint_uri or ""
    if keeps_files(stage, params) and is_within(checkpoints, CHECKPOINT_PATH):
        kubernetes.mount_pvc(task, claim.name if claim else cluster.checkpoint_claim, CHECKPOINT_PATH)
        if claim:
            task.after(claim.opened)
    if stage in (*DOWNLOADING_STAGES, "import_code"):
        for path, name in cluster.claims.items():
            kubernetes.mount_pvc(task, name, path)
    if profile.scratch:
        _mount_scratch(task, profile.scratch)


def _mount_scratch(task: Any, scratch: Scratch) -> None:
    for name, folder in SCRATCH_VARIABLES.items():
        task.set_env_variable(name, f"{SCRATCH_PATH}{folder}")
    if scratch.storage_class is None:
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH_PATH, size_limit=scratch.size)
    else:
        kubernetes.add_ephemeral_volume(
            task,
            volume_name="scratch",
            mount_path=SCRATCH_PATH,
            access_modes=["ReadWriteOnce"],
            size=scratch.size,
            storage_class_name=scratch.storage_class,
        )


def _may_cache(stage: str, cluster: ClusterConfig, profile: Profile, sources: list[str]) -> bool:
    """Whether the same inputs give the same outputs. KFP's cache key has the image's name, not its content, and URIs, not data."""
    if stage not in DETERMINISTIC_STAGES or profile.num_accelerators or not has_digest(image(cluster, IMAGE_OF[stage])):
        return False
    return all(_is_immutable(source) for source in sources)


def _is_immutable(source: str) -> bool:
    """Whether a source cannot change: a package with its version, or an upload under its digest."""
    return source.startswith(PREFIX) or re.search(r"/sha256-[0-9a-f]{64}(/|$)", source) is not None
