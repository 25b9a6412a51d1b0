"""Settings of what a cluster gives to each stage: images, nodes, memory, secrets."""

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from components.rlhf.config.base import BaseConfig, Count, Positive
from components.rlhf.text.credentials import is_secret_name

STAGES = ("import_model", "prepare_data", "sft", "reward_model", "judge", "ppo", "evaluation", "register", "notify")
TRAINING_STAGES = ("sft", "reward_model", "ppo")


def _quantity(pattern: str, example: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if isinstance(value, bool) or not re.fullmatch(pattern, str(value)):
            raise ValueError(f"{value!r} is no such amount; write it like {example}")
        return str(value)

    return check


def _text(value: object) -> object:
    """YAML reads true and 22000 as what they are not in a label."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


Cpu = Annotated[str, BeforeValidator(_quantity(r"[1-9][0-9]*m?|[0-9]+\.[0-9]+", "4 or 500m"))]
Memory = Annotated[str, BeforeValidator(_quantity(r"[1-9][0-9]*(Mi|Gi|Ti)", "64Gi"))]
Label = Annotated[str, BeforeValidator(_text)]
UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


class MatchExpression(BaseConfig):
    """One condition on a node's label."""

    key: str
    """Label of the node."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """Gt and Lt compare whole numbers."""
    values: tuple[Label, ...] = ()
    """What the label is compared with."""


class NodeAffinity(BaseConfig):
    """Nodes that a stage must or would rather run on. All conditions of one hold together; several that demand are alternatives."""

    match_expressions: Annotated[tuple[MatchExpression, ...], Field(min_length=1)]
    weight: Annotated[int, Field(ge=1, le=100)] | None = None
    """How much it is preferred; null demands it."""


class Toleration(BaseConfig):
    """A taint that does not keep a stage off a node."""

    key: str | None = None
    """Key of the taint; null is every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Equal compares the value, too."""
    value: Label | None = None
    """Of the taint, with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Of the taint; null is every effect."""

    @model_validator(mode="after")
    def _consistent(self) -> "Toleration":
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a toleration with a value needs the operator Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("a toleration with the operator Equal needs a key")
        return self


class Scratch(BaseConfig):
    """A volume of the task alone, mounted at /tmp, where caches and temporary files go. Without one they go to the node's disk."""

    size: Memory
    """Of the volume."""
    storage_class: str | None = None
    """StorageClass of the volume; null is the cluster's default."""


class Profile(BaseConfig):
    """What one kind of node gives to a stage."""

    accelerator: str = "nvidia.com/gpu"
    """Resource name of the accelerators."""
    num_accelerators: Count = 0
    """Accelerators of the stage, all on one node."""
    cpu: Cpu = "2"
    """CPUs: request and limit."""
    memory: Memory = "8Gi"
    """Main memory of the programs."""
    shared_memory: Memory | None = None
    """Size of /dev/shm, which lies in main memory: the pod requests memory + shared_memory. null leaves the node's 64 MiB."""
    scratch: Scratch | None = None
    node_selector: dict[str, Label] = Field(default_factory=dict)
    """Labels that the node must have."""
    node_affinity: tuple[NodeAffinity, ...] = ()
    tolerations: tuple[Toleration, ...] = ()
    queue: str | None = None
    """Kueue's LocalQueue that the stage waits in."""
    labels: dict[str, Label] = Field(default_factory=dict)
    """More labels of the pod."""

    @property
    def pod_memory(self) -> str:
        """What the pod requests and may use: the programs' memory and /dev/shm, as a Kubernetes quantity."""
        total = sum(bytes_of(part) for part in (self.memory, self.shared_memory) if part)
        return f"{total // 2**30}Gi" if total % 2**30 == 0 else f"{total // 2**20}Mi"


class Images(BaseConfig):
    """Container images by role, each name:tag or name@sha256:digest."""

    trainer: str = "kfp-rlhf/trainer:0.1.0"
    """torch, transformers, DeepSpeed: import_model, prepare_data, sft, reward_model, judge."""
    rollout: str = "kfp-rlhf/rollout:0.1.0"
    """The trainer's and vLLM: ppo, evaluation."""
    tools: str = "kfp-rlhf/tools:0.1.0"
    """No torch: register, notify."""


class Mirrors(BaseConfig):
    """What stands in for the internet in an air-gapped cluster."""

    registry: str | None = None
    """Put before each image name that names no registry: registry.example.com/team."""
    pypi: str | None = None
    """Package index (PIP_INDEX_URL) of import_model and prepare_data."""
    hub: str | None = None
    """Hugging Face mirror (HF_ENDPOINT) of import_model and prepare_data."""


class Secrets(BaseConfig):
    """Names of Kubernetes Secrets in the namespace of the runs; null uses none."""

    s3: str | None = "rlhf-s3"
    """AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, if need be AWS_SESSION_TOKEN, AWS_ENDPOINT_URL_S3, AWS_REGION; only for s3://."""
    mlflow: str | None = "rlhf-mlflow"
    """MLFLOW_TRACKING_URI and optionally MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN; may be missing."""
    hf_token: str | None = "rlhf-hf-token"
    """HF_TOKEN for import_model; may be missing."""
    webhook: str | None = "rlhf-webhook"
    """WEBHOOK_URL for notify; may be missing."""


class ClusterConfig(BaseConfig):
    """What a cluster needs to know; a run on this machine heeds none of it but environment."""

    launcher: Literal["local"] = "local"
    """local: a stage starts its processes itself, on one node."""
    stages: dict[str, str] = Field(default_factory=dict)
    """Profile of each stage that runs elsewhere than on default_profile: {ppo: gpu-80gb}."""
    default_profile: str = "cpu"
    """Profile of every stage that stages does not name."""
    profiles: dict[str, Profile] = Field(default_factory=lambda: {"cpu": Profile()}, validate_default=True)
    images: Images = Images()
    require_digests: bool = False
    """true refuses images without @sha256: what runs is then what was tested."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When a node fetches an image."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with credentials for the registry."""
    mirrors: Mirrors = Mirrors()
    environment: dict[str, Label] = Field(default_factory=dict)
    """Environment variables of every stage, on this machine too: proxies, NCCL's settings."""
    secrets: Secrets = Secrets()
    service_account: str | None = "rlhf-runner"
    """Account of the runs; null is the default of Kubeflow Pipelines."""
    run_as_user: Count | None = 1000
    """User and group id of the stages; null leaves it to the image and the administrator (OpenShift)."""
    checkpoint_claim: str | None = "rlhf-checkpoints"
    """PersistentVolumeClaim for checkpoints where storage.checkpoint_uri is null; null keeps none, and a retry starts afresh."""
    claims: dict[str, str] = Field(default_factory=dict)
    """PersistentVolumeClaims with your models and data, by the path that import_model and prepare_data see them at: {/data: team-data}."""
    num_retries: Count = 3
    """Retries of a stage on accelerators, a minute after its failure, then two, then four."""
    timeout_hours: Annotated[Positive, Field(le=24 * 365)] = 24.0
    """Longest time of one attempt of a stage on accelerators."""
    pipeline: str = "rlhf"
    """Name that versions are uploaded under."""
    ui_url: str | None = None
    """Where people open Kubeflow Pipelines; null is the host that the run is submitted to."""

    @field_validator("environment")
    @classmethod
    def _environment(cls, value: dict[str, str]) -> dict[str, str]:
        secret = next((name for name in value if is_secret_name(name)), None)
        if secret is not None:
            raise ValueError(
                f"{secret} is a secret by its name, and these variables are written into the pipeline; put it into a Secret "
                "(cluster.secrets), and on this machine into your own environment"
            )
        return value

    @field_validator("claims")
    @classmethod
    def _claims(cls, value: dict[str, str]) -> dict[str, str]:
        wrong = [path for path in value if not path.startswith("/") or path.rstrip("/") in ("", "/tmp")]
        if wrong:
            raise ValueError(f"{wrong[0]} is no path to mount a volume at; write one like /data")
        return value

    @model_validator(mode="after")
    def _known(self) -> "ClusterConfig":
        for stage, profile in self.stages.items():
            if stage not in STAGES:
                raise ValueError(f"stages names {stage}, which is no stage; stages: {', '.join(STAGES)}")
            self._require(profile, f"stages.{stage}")
        self._require(self.default_profile, "default_profile")
        return self

    def _require(self, profile: str, key: str) -> None:
        if profile not in self.profiles:
            raise ValueError(f"{key} is {profile}, which is no profile; profiles: {', '.join(sorted(self.profiles))}")

    def profile(self, stage: str) -> Profile:
        """The profile that a stage runs on."""
        return self.profiles[self.stages.get(stage, self.default_profile)]

    def num_accelerators(self, stage: str) -> int:
        return self.profile(stage).num_accelerators


def bytes_of(quantity: str) -> int:
    """A memory quantity as bytes."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def has_digest(image: str) -> bool:
    return DIGEST.search(image) is not None
