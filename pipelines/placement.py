"""Where each task of the DAG runs, and with what: image, node, memory, secrets, volumes, retries. The DAG itself is dag.py."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from kfp import kubernetes

from components.rlhf.config.cluster import TRAINING_STAGES, ClusterConfig, Mirrors, NodeAffinity, Profile, has_digest
from components.rlhf.config.params import Params
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.pypi import PREFIX
from components.rlhf.text.errors import InputError

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
DOWNLOADING_STAGES = ("import_model", "prepare_data")  # what comes from outside comes in here
DETERMINISTIC = (*DOWNLOADING_STAGES, "judge")
FILES = (".jsonl", ".json", ".ndjson", ".parquet")
CHECKPOINTS = "/checkpoints"
PART_OF = ("app.kubernetes.io/part-of", "kfp-rlhf")  # the network policies of manifests/ select by it
HUB = ("kfp-rlhf/egress", "hub")
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_MORE = ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION")
MLFLOW_KEYS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def configure_task(
    task: Any, stage: str, params: Params, *, source: str = "", where: Mapping[str, Any] | None = None
) -> Any:
    """Give a task all that its stage gets from the platform.

    source is what an import_model reads. where holds the pipeline's parameters node_selector and tolerations; they stand in for those
    of the profile, on the stages that share the profile of gpu_stage.
    """
    cluster, profile = params.cluster, params.cluster.profile(stage)
    sources = [source] if stage == "import_model" else data_sources(params) if stage == "prepare_data" else []
    task.set_container_image(image(cluster, stage))
    kubernetes.use_field_path_as_env(task, env_name="RLHF_RUN_ID", field_path="metadata.labels['pipeline/runid']")
    for name, value in _environment(cluster, stage).items():
        task.set_env_variable(name, value)
    _set_pod(task, stage, cluster, profile, needs_hub=any(is_remote(s) for s in sources))
    _set_resources(task, profile)
    steered = profile.num_accelerators and profile == cluster.profile(gpu_stage(params))
    _set_node(task, profile, where if steered else None)
    _set_secrets(task, stage, params, sources)
    _set_volumes(task, stage, params, profile)
    if profile.num_accelerators and stage != "notify":
        if cluster.num_retries:
            task.set_retry(cluster.num_retries, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="600s")
        kubernetes.set_timeout(task, int(3600 * cluster.timeout_hours))
    return task.set_caching_options(_may_cache(stage, cluster, profile, sources))


def image(cluster: ClusterConfig, stage: str) -> str:
    """The image of a stage, from the registry's mirror where there is one."""
    name: str = getattr(cluster.images, IMAGE_OF[stage])
    host = name.split("/")[0]
    has_registry = "/" in name and ("." in host or ":" in host or host == "localhost")
    return name if has_registry or not cluster.mirrors.registry else f"{cluster.mirrors.registry.rstrip('/')}/{name}"


def require_digests(cluster: ClusterConfig) -> None:
    """Raise InputError for an image without a digest where the settings demand one."""
    for role in sorted(set(IMAGE_OF.values())):
        name = getattr(cluster.images, role)
        if cluster.require_digests and not has_digest(name):
            raise InputError(
                f"cluster.images.{role} is {name}, which has no digest, and cluster.require_digests is true; "
                "write NAME@sha256:DIGEST, as your registry shows it."
            )


def gpu_stage(params: Params) -> str:
    """The stage whose profile the run parameters gpu_node_selector and gpu_tolerations stand in for: ppo, or the first with GPUs."""
    return next((s for s in ("ppo", "sft", "reward_model", "evaluation") if params.cluster.num_accelerators(s)), "ppo")


def gpu_node_selector(params: Params) -> dict[str, str]:
    """The default of the run parameter; empty where no stage has accelerators."""
    profile = params.cluster.profile(gpu_stage(params))
    return dict(profile.node_selector) if profile.num_accelerators else {}


def gpu_tolerations(params: Params) -> list[dict[str, str]]:
    """The default of the run parameter, as Kubernetes writes tolerations."""
    profile = params.cluster.profile(gpu_stage(params))
    return [t.model_dump(exclude_none=True) for t in profile.tolerations] if profile.num_accelerators else []


def cluster_storage(params: Params) -> StorageConfig:
    """The storage settings of a run on a cluster: without a place for checkpoints they go to the claim's volume."""
    place_of = params.storage.checkpoint_uri or (CHECKPOINTS if params.cluster.checkpoint_claim else None)
    return params.storage.model_copy(update={"checkpoint_uri": place_of})


def data_sources(params: Params) -> list[str]:
    """Where prepare_data reads from, each once."""
    sources = (params.data.demonstrations, params.data.preferences, params.data.prompts)
    return sorted({source.path for source in sources if source})


def is_remote(source: str) -> bool:
    """Whether a source comes from a hub or a package index: no path and no bucket."""
    return not (source.startswith(("s3://", "/", "./", "../", "~")) or PurePosixPath(source).suffix in FILES)


def _environment(cluster: ClusterConfig, stage: str) -> dict[str, str]:
    mirrors: Mirrors = cluster.mirrors
    found = {"PIP_INDEX_URL": mirrors.pypi, "HF_ENDPOINT": mirrors.hub} if stage in DOWNLOADING_STAGES else {}
    return {name: value for name, value in found.items() if value} | dict(cluster.environment)


def _set_pod(task: Any, stage: str, cluster: ClusterConfig, profile: Profile, *, needs_hub: bool) -> None:
    labels = dict([PART_OF, ("kfp-rlhf/stage", stage.replace("_", "-"))]) | (dict([HUB]) if needs_hub else {})
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


def _set_resources(task: Any, profile: Profile) -> None:
    task.set_cpu_request(profile.cpu).set_cpu_limit(profile.cpu)
    task.set_memory_request(profile.pod_memory).set_memory_limit(profile.pod_memory)
    if profile.num_accelerators:
        task.set_accelerator_type(profile.accelerator).set_accelerator_limit(profile.num_accelerators)
    if profile.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=profile.shared_memory)


def _set_node(task: Any, profile: Profile, where: Mapping[str, Any] | None) -> None:
    if where:
        kubernetes.add_node_selector_json(task, where["node_selector"])
        kubernetes.add_toleration_json(task, where["tolerations"])
    else:
        for key, value in profile.node_selector.items():
            kubernetes.add_node_selector(task, key, value)
        for toleration in profile.tolerations:
            kubernetes.add_toleration(task, **toleration.model_dump())
    for affinity in profile.node_affinity:
        kubernetes.add_node_affinity(task, match_expressions=_expressions(affinity), weight=affinity.weight)


def _expressions(affinity: NodeAffinity) -> list[dict[str, Any]]:
    return [e.model_dump(mode="json") for e in affinity.match_expressions]


def _set_secrets(task: Any, stage: str, params: Params, sources: list[str]) -> None:
    secrets, stored = params.cluster.secrets, cluster_storage(params)
    uris = [*sources]
    if stage in (*TRAINING_STAGES, "notify"):
        uris += [stored.checkpoint_uri or ""]
    if stage in TRAINING_STAGES:
        uris += [stored.publish_uri or ""]
    if secrets.s3 and not stored.anonymous and any(uri.startswith("s3://") for uri in uris):
        # Without these the stage could only fail later; a pod that waits for its Secret says so by itself.
        _use_secret(task, secrets.s3, S3_KEYS, optional=False)
        _use_secret(task, secrets.s3, S3_MORE, optional=True)
    if secrets.mlflow and params.tracking.enabled:
        _use_secret(task, secrets.mlflow, MLFLOW_KEYS, optional=True)
    if secrets.hf_token and stage == "import_model":
        _use_secret(task, secrets.hf_token, ("HF_TOKEN",), optional=True)
    if secrets.webhook and stage == "notify":
        keys = {"WEBHOOK_URL": "RLHF_WEBHOOK_URL"}  # a laptop may have the short name for something else
        kubernetes.use_secret_as_env(task, secret_name=secrets.webhook, secret_key_to_env=keys, optional=True)


def _use_secret(task: Any, name: str, keys: tuple[str, ...], *, optional: bool) -> None:
    kubernetes.use_secret_as_env(
        task, secret_name=name, secret_key_to_env={key: key for key in keys}, optional=optional
    )


def _set_volumes(task: Any, stage: str, params: Params, profile: Profile) -> None:
    cluster, checkpoints = params.cluster, cluster_storage(params).checkpoint_uri or ""
    if stage in (*TRAINING_STAGES, "notify") and cluster.checkpoint_claim and is_within(checkpoints, CHECKPOINTS):
        kubernetes.mount_pvc(task, cluster.checkpoint_claim, CHECKPOINTS)
    if stage in DOWNLOADING_STAGES:
        for path, claim in cluster.claims.items():
            kubernetes.mount_pvc(task, claim, path)
    if profile.scratch:
        kubernetes.add_ephemeral_volume(
            task,
            volume_name="scratch",
            mount_path="/tmp",  # the one folder that our images write to
            access_modes=["ReadWriteOnce"],
            size=profile.scratch.size,
            storage_class_name=profile.scratch.storage_class,
        )


def is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _may_cache(stage: str, cluster: ClusterConfig, profile: Profile, sources: list[str]) -> bool:
    """Only where the same inputs give the same outputs: KFP's key holds the image's name and not its content, and URIs, not data."""
    fixed = all(_is_fixed(source) for source in sources)
    return stage in DETERMINISTIC and not profile.num_accelerators and has_digest(image(cluster, stage)) and fixed


def _is_fixed(source: str) -> bool:
    """Whether a source can never be another: a package with its version, or what was uploaded under its digest."""
    return source.startswith(PREFIX) or re.search(r"/sha256-[0-9a-f]{64}(/|$)", source) is not None
