"""What the platform gives to each task of the DAG (dag.py): image, node, memory, secrets, volumes, retries."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kfp import kubernetes

from components.rlhf.config.cluster import (
    PROCESS_STAGES,
    STAGES,
    TRAINING_STAGES,
    ClusterConfig,
    Profile,
    Scratch,
    has_digest,
)
from components.rlhf.config.params import Params
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.pypi import PREFIX
from components.rlhf.text.errors import InputError
from pipelines.sources import data_sources, is_on_hub, is_remote, is_within

if TYPE_CHECKING:
    from pipelines.claim import CheckpointClaim

IMAGE_OF = {
    "import_model": "trainer",
    "prepare_data": "trainer",
    "sft": "trainer",
    "reward_model": "trainer",
    "judge": "trainer",
    "ppo": "rollout",
    "evaluation": "rollout",
    "register": "tools",
    "notify": "tools",
}
DOWNLOADING_STAGES = ("import_model", "prepare_data")  # the only stages that download models and data
DETERMINISTIC_STAGES = (*DOWNLOADING_STAGES, "judge")
JUDGING_STAGES = ("judge", "evaluation")  # the stages that ask judges
CHECKPOINT_PATH, SCRATCH_PATH = "/checkpoints", "/scratch"
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
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_OPTIONAL_KEYS = ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION")
MLFLOW_KEYS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


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

    source is what an import_model task reads. inputs are the pipeline's inputs, by name; those of node_inputs() replace the node
    selector and tolerations of a profile. claim is the one that this run creates for its checkpoints.
    """
    cluster, profile = params.cluster, params.cluster.profile(stage)
    sources = [source] if stage == "import_model" else data_sources(params) if stage == "prepare_data" else []
    task.set_container_image(image(cluster, role_of_image(params, stage)))
    kubernetes.use_field_path_as_env(task, env_name="RLHF_RUN_ID", field_path="metadata.labels['pipeline/runid']")
    for name, value in _environment(cluster, stage).items():
        task.set_env_variable(name, value)
    asks_endpoint = stage in JUDGING_STAGES and bool(params.endpoint_judges)
    egress = HUB_LABELS if any(is_remote(s) for s in sources) else ENDPOINT_LABELS if asks_endpoint else {}
    _set_pod(task, stage, cluster, profile, egress)
    _set_resources(task, profile)
    if profile.num_accelerators and IMAGE_OF[stage] != "tools":  # which has no torch to look for them
        _tell_num_accelerators(task, profile)
    set_node(task, stage, params, inputs or {})
    _set_secrets(task, stage, params, sources)
    _set_volumes(task, stage, params, profile, claim)
    _set_retries(task, cluster)
    return task.set_caching_options(not asks_endpoint and _may_cache(stage, cluster, profile, sources))


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
        name, profile = cluster.stages.get(stage, cluster.default_profile), cluster.profile(stage)
        if not profile.num_accelerators:
            continue
        selector, tolerations = input_names(name)
        if profiles.setdefault(selector, name) != name:
            raise InputError(
                f"cluster.profiles: {profiles[selector]} and {name} are one name as an input of the pipeline ({selector}); rename one."
            )
        inputs[selector] = dict(profile.node_selector)
        inputs[tolerations] = [t.model_dump(exclude_none=True) for t in profile.tolerations]
    return inputs


def cluster_storage(params: Params) -> StorageConfig:
    """The storage settings of a run on a cluster.

    Without a URI of their own, checkpoints are on a volume if there is one, else in storage.uri, and so are published models.
    """
    storage, volume = params.storage, params.cluster.checkpoint_claim or params.cluster.checkpoint_volume
    root = storage.uri.rstrip("/") if storage.uri and storage.uri.startswith("s3://") else None
    checkpoint_uri = storage.checkpoint_uri or (CHECKPOINT_PATH if volume else root and f"{root}/checkpoints")
    publish_uri = storage.publish_uri or (root and f"{root}/models")
    answers_uri = storage.answers_uri or (root and f"{root}/answers")
    return storage.model_copy(
        update={"uri": None, "checkpoint_uri": checkpoint_uri, "publish_uri": publish_uri, "answers_uri": answers_uri}
    )


def require_checkpoints_for_budget(params: Params) -> None:
    """Raise InputError for a run with a budget that would save no checkpoints, where it also keeps what it has spent."""
    if params.cluster.budget is not None and not cluster_storage(params).checkpoint_uri:
        raise InputError(
            f"cluster.budget is {params.cluster.budget:g}, but no checkpoints are saved, and a run that stops at its budget would lose "
            "everything; set storage.uri to s3://BUCKET/PREFIX, cluster.checkpoint_claim or cluster.checkpoint_volume."
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


def _set_pod(task: Any, stage: str, cluster: ClusterConfig, profile: Profile, egress: Mapping[str, str]) -> None:
    labels = {**TASK_LABELS, "kfp-rlhf/stage": stage.replace("_", "-"), **egress}
    if stage in PROCESS_STAGES:
        labels |= PROCESS_GROUP_LABELS
    if profile.queue:
        labels["kueue.x-k8s.io/queue-name"] = profile.queue
    for key, value in (labels | profile.labels).items():
        kubernetes.add_pod_label(task, key, value)
    kubernetes.set_image_pull_policy(task, cluster.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    if cluster.run_as_user is not None:
        user = cluster.run_as_user
        kubernetes.set_security_context(task, run_as_user=user, run_as_group=user, run_as_non_root=user != 0)


def _tell_num_accelerators(task: Any, profile: Profile) -> None:
    """Through an annotation, because a local run sets the variables of a task too, and has other accelerators."""
    kubernetes.add_pod_annotation(task, NUM_ACCELERATORS_ANNOTATION, str(profile.num_accelerators))
    path = f"metadata.annotations['{NUM_ACCELERATORS_ANNOTATION}']"
    kubernetes.use_field_path_as_env(task, env_name="RLHF_NUM_ACCELERATORS", field_path=path)


def _set_resources(task: Any, profile: Profile) -> None:
    task.set_cpu_request(profile.cpu).set_cpu_limit(profile.cpu)
    task.set_memory_request(profile.pod_memory).set_memory_limit(profile.pod_memory)
    if profile.num_accelerators:
        task.set_accelerator_type(profile.accelerator).set_accelerator_limit(profile.num_accelerators)
    if profile.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=profile.shared_memory)


def _set_retries(task: Any, cluster: ClusterConfig) -> None:
    timeout = int(3600 * cluster.timeout_hours)
    kubernetes.set_timeout(task, timeout)
    retries = cluster.num_retries
    if retries:
        waits = BACKOFF_SECONDS * (2**retries - 1)
        limit = (retries + 1) * timeout + waits + QUEUE_SECONDS
        task.set_retry(
            retries, backoff_duration=f"{BACKOFF_SECONDS}s", backoff_factor=2.0, backoff_max_duration=f"{limit}s"
        )


def set_node(task: Any, stage: str, params: Params, inputs: Mapping[str, Any]) -> None:
    """Place a task on the nodes of a stage: by inputs of the pipeline if its profile has them, else by the profile."""
    profile = params.cluster.profile(stage)
    selector, tolerations = input_names(params.cluster.stages.get(stage, params.cluster.default_profile))
    if selector in inputs:
        kubernetes.add_node_selector_json(task, inputs[selector])
        kubernetes.add_toleration_json(task, inputs[tolerations])
    else:
        for key, value in profile.node_selector.items():
            kubernetes.add_node_selector(task, key, value)
        for toleration in profile.tolerations:
            kubernetes.add_toleration(task, **toleration.model_dump())
    for affinity in profile.node_affinity:
        expressions = [e.model_dump(mode="json") for e in affinity.match_expressions]
        kubernetes.add_node_affinity(task, match_expressions=expressions, weight=affinity.weight)


def _set_secrets(task: Any, stage: str, params: Params, sources: list[str]) -> None:
    secrets, storage = params.cluster.secrets, cluster_storage(params)
    uris = [*sources]
    if stage in (*TRAINING_STAGES, "notify"):  # notify deletes what is left of the checkpoints
        uris += [storage.checkpoint_uri or ""]
    if stage in TRAINING_STAGES:
        uris += [storage.publish_uri or ""]
    if stage in JUDGING_STAGES and params.endpoint_judges:
        uris += [storage.answers_uri or ""]
    if secrets.s3 and not storage.anonymous and any(uri.startswith("s3://") for uri in uris):
        # Not optional: Kubernetes reports a pod whose Secret is missing, while the stage would only fail later.
        _use_secret(task, secrets.s3, S3_KEYS, optional=False)
        _use_secret(task, secrets.s3, S3_OPTIONAL_KEYS, optional=True)
    if secrets.mlflow and params.tracking.enabled:
        _use_secret(task, secrets.mlflow, MLFLOW_KEYS, optional=True)
    if secrets.hf_token and any(is_on_hub(source) for source in sources):
        _use_secret(task, secrets.hf_token, ("HF_TOKEN",), optional=True)
    if secrets.judge and stage in JUDGING_STAGES:
        variables = sorted({judge.api_key_variable for judge in params.endpoint_judges if judge.api_key_variable})
        _use_secret(task, secrets.judge, tuple(variables), optional=True)
    if secrets.webhook and stage == "notify":
        keys = {"WEBHOOK_URL": "RLHF_WEBHOOK_URL"}  # WEBHOOK_URL may have another meaning on a laptop
        kubernetes.use_secret_as_env(task, secret_name=secrets.webhook, secret_key_to_env=keys, optional=True)


def _use_secret(task: Any, name: str, keys: tuple[str, ...], *, optional: bool) -> None:
    if not keys:
        return
    kubernetes.use_secret_as_env(
        task, secret_name=name, secret_key_to_env={key: key for key in keys}, optional=optional
    )


def _set_volumes(task: Any, stage: str, params: Params, profile: Profile, claim: "CheckpointClaim | None") -> None:
    cluster, checkpoints = params.cluster, cluster_storage(params).checkpoint_uri or ""
    if stage in TRAINING_STAGES and is_within(checkpoints, CHECKPOINT_PATH):
        kubernetes.mount_pvc(task, claim.name if claim else cluster.checkpoint_claim, CHECKPOINT_PATH)
        if claim:
            task.after(claim.opened)
    if stage in DOWNLOADING_STAGES:
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
