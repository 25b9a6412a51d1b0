"""Settings of runs on a cluster: images, node profiles, volumes and secrets."""

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from components.rlhf.config.base import BaseConfig, Count, NonNegative, Positive, PositiveInt
from components.rlhf.config.kubernetes import Image, LabelKey, LabelValue, ObjectName, Text, VariableName
from components.rlhf.text.credentials import is_secret_name

STAGES = (
    "import_model", "prepare_data", "import_code", "sft", "reward_model", "judge", "ppo", "dpo", "checks", "evaluation",
    "register", "notify",
)  # fmt: skip
TRAINING_STAGES = ("sft", "reward_model", "ppo", "dpo")
PROCESS_STAGES = (*TRAINING_STAGES, "evaluation")  # the stages that can run in several processes


def _quantity(pattern: str, example: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if isinstance(value, bool) or not re.fullmatch(pattern, str(value)):
            raise ValueError(f"{value!r} is not a valid quantity; write it like {example}")
        return str(value)

    return check


Cpu = Annotated[str, BeforeValidator(_quantity(r"[1-9][0-9]*m?|[0-9]+\.[0-9]+", "4 or 500m"))]
Memory = Annotated[str, BeforeValidator(_quantity(r"[1-9][0-9]*(Mi|Gi|Ti)", "64Gi"))]
UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


class MatchExpression(BaseConfig):
    """One condition on a node label."""

    key: LabelKey
    """Node label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """How the label is compared with values; Gt and Lt compare integers."""
    values: tuple[LabelValue, ...] = ()
    """Values that the label is compared with."""


class NodeAffinity(BaseConfig):
    """Nodes that a stage requires or prefers. The conditions of one entry are ANDed, several required entries are ORed."""

    match_expressions: Annotated[tuple[MatchExpression, ...], Field(min_length=1)]
    weight: Annotated[int, Field(ge=1, le=100)] | None = None
    """Weight of the preference, 1 to 100; null makes the affinity required."""


class Toleration(BaseConfig):
    """A taint that a stage tolerates."""

    key: LabelKey | None = None
    """Key of the taint; null matches every key."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists matches any value of the taint, Equal only value."""
    value: LabelValue | None = None
    """Value of the taint, for the operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; null matches every effect."""

    @model_validator(mode="after")
    def _require_consistent_values(self) -> "Toleration":
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a toleration with a value needs the operator Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("a toleration with the operator Equal needs a key")
        return self


class Scratch(BaseConfig):
    """A volume at /scratch for temporary files and caches, which are otherwise in the container's /tmp."""

    size: Memory
    """Size of the volume; a pod that writes more to the node's disk is evicted."""
    storage_class: ObjectName | None = None
    """StorageClass of a volume of its own, to which all users must be able to write; null is a folder on the node's disk."""


class CheckpointVolume(BaseConfig):
    """A PersistentVolumeClaim that each run creates for its checkpoints, and deletes when it succeeds."""

    storage_class: ObjectName
    """StorageClass of the claim; Kubeflow Pipelines cannot use the default one of the cluster."""
    size: Memory = "100Gi"
    """Size of the claim: about 2 x 12 bytes per trained parameter for each model in training."""


class Profile(BaseConfig):
    """Resources and scheduling of a stage's pod."""

    accelerator: LabelKey = "nvidia.com/gpu"
    """Resource name of the accelerators."""
    price_per_hour: NonNegative | None = None
    """Price of one pod of this profile per hour, in any currency; null is unknown."""
    num_accelerators: Count = 0
    """Number of accelerators of each node."""
    gpu_memory: Memory | None = None
    """Memory of one accelerator, which plans are compared with; null is unknown."""
    num_nodes: PositiveInt = 1
    """Number of nodes of the training stages and evaluation, each with these resources; above one needs cluster.launcher trainjob."""
    cpu: Cpu = "2"
    """CPU request and limit."""
    memory: Memory = "8Gi"
    """Memory request and limit, without /dev/shm."""
    shared_memory: Memory | None = None
    """Size of /dev/shm, which is added to the pod's memory request and limit; null leaves the container runtime's 64 MiB."""
    scratch: Scratch | None = None
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels that the node must have."""
    node_affinity: tuple[NodeAffinity, ...] = ()
    tolerations: tuple[Toleration, ...] = ()
    queue: ObjectName | None = None
    """Kueue LocalQueue of the pod."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Additional labels of the pod."""

    @property
    def pod_memory(self) -> str:
        """Memory request and limit of the pod (memory + shared_memory) as a Kubernetes quantity."""
        total = sum(bytes_of(quantity) for quantity in (self.memory, self.shared_memory) if quantity)
        return f"{total // 2**30}Gi" if total % 2**30 == 0 else f"{total // 2**20}Mi"


class Images(BaseConfig):
    """Container images by role, each NAME:TAG or NAME@sha256:DIGEST."""

    trainer: Image = "kfp-rlhf/trainer:0.1.0"
    """Image of import_model, prepare_data, sft, reward_model, dpo, judge and checks: torch, transformers and DeepSpeed, without vLLM."""
    rollout: Image = "kfp-rlhf/rollout:0.1.0"
    """Image of ppo and evaluation, and of reward_model if it calibrates with vLLM: the trainer's packages and vLLM."""
    tools: Image = "kfp-rlhf/tools:0.1.0"
    """Image of register and notify, without torch."""


class Mirrors(BaseConfig):
    """Mirrors for an air-gapped cluster."""

    registry: str | None = None
    """Prefix for image names without a registry, such as registry.example.com/team."""
    pypi: str | None = None
    """Package index (PIP_INDEX_URL) for import_model and prepare_data."""
    hub: str | None = None
    """Hugging Face mirror (HF_ENDPOINT) for import_model and prepare_data."""


class Secrets(BaseConfig):
    """Names of Kubernetes Secrets in the namespace of the runs; null uses none."""

    s3: ObjectName | None = "rlhf-s3"
    """Secret for s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, optional AWS_SESSION_TOKEN, AWS_ENDPOINT_URL_S3, AWS_REGION."""
    mlflow: ObjectName | None = "rlhf-mlflow"
    """Optional Secret with MLFLOW_TRACKING_URI and optional MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN."""
    hf_token: ObjectName | None = "rlhf-hf-token"
    """Optional Secret with HF_TOKEN, for the tasks that read a model or a data set of the Hugging Face hub."""
    webhook: ObjectName | None = "rlhf-webhook"
    """Optional Secret with WEBHOOK_URL, for notify."""
    judge: ObjectName | None = "rlhf-judge"
    """Optional Secret with the keys of judges and rewards that are servers, each under its api_key_variable or token_variable."""


class ClusterConfig(BaseConfig):
    """Settings of runs on a cluster; of these, local runs use only environment, budget and prices."""

    launcher: Literal["local", "trainjob"] = "local"
    """local: a stage starts its processes itself, on one node; trainjob: sft, reward_model, ppo, dpo and evaluation are TrainJobs."""
    runtime: ObjectName = "rlhf"
    """TrainingRuntime of the TrainJobs, in the namespace of the runs (manifests/components/trainjob)."""
    stages: dict[str, str] = Field(default_factory=dict)
    """Profile of each stage that does not use default_profile: {ppo: gpu-80gb}; checks has that of evaluation."""
    default_profile: str = "cpu"
    """Profile of all other stages."""
    profiles: dict[str, Profile] = Field(default_factory=lambda: {"cpu": Profile()}, validate_default=True)
    check_memory: bool = True
    """Refuse a run of which a stage cannot fit into its profile, or into this machine, by the arithmetic of kfp-rlhf plan."""
    images: Images = Images()
    require_digests: bool = False
    """Reject images without @sha256 digest."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """imagePullPolicy of the pods."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Secrets with credentials of the image registry."""
    mirrors: Mirrors = Mirrors()
    environment: dict[VariableName, Text] = Field(default_factory=dict)
    """Environment variables of every stage, such as proxies and NCCL settings; local runs use them too."""
    secrets: Secrets = Secrets()
    service_account: ObjectName | None = "rlhf-runner"
    """Service account of the runs; null is the default of Kubeflow Pipelines."""
    run_as_user: Count | None = 1000
    """User and group id of the containers; null leaves them to the image and the cluster (OpenShift)."""
    checkpoint_claim: ObjectName | None = None
    """Existing PersistentVolumeClaim (ReadWriteMany) for the checkpoints of all runs, instead of storage.checkpoint_uri."""
    checkpoint_volume: CheckpointVolume | None = None
    """A claim per run instead. Without any of the three, nothing is saved, and a retry starts from the beginning."""
    claims: dict[str, ObjectName] = Field(default_factory=dict)
    """PersistentVolumeClaims with models and data by mount path in import_model and prepare_data: {/data: team-data}."""
    num_retries: Annotated[Count, Field(le=10)] = 3
    """Number of retries of a stage, with waits of 1, 2, 4... minutes; what is retried is a setting of Argo (manifests/README.md)."""
    timeout_hours: Annotated[Positive, Field(le=24 * 365)] = 24.0
    """Time limit of one attempt of a stage, in hours."""
    budget: Positive | None = None
    """Most that the training stages may cost together, in the currency of price_per_hour; at the limit a stage saves and ends."""
    allow_user_code: bool = False
    """Allow Python functions and commands of the params file in submitted and compiled runs; a run on this machine needs no permission."""
    pipeline: str = "rlhf"
    """Name of the pipeline in Kubeflow Pipelines; each submission uploads a version."""
    ui_url: str | None = None
    """URL of the Kubeflow Pipelines UI, for links; null is the host that the run is submitted to."""

    @field_validator("environment")
    @classmethod
    def _reject_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        secret = next((name for name in value if is_secret_name(name)), None)
        if secret is not None:
            raise ValueError(
                f"{secret} looks like a secret, but these variables are written into the pipeline; put it into a Secret "
                "(cluster.secrets), and for local runs into your own environment"
            )
        return value

    @field_validator("claims")
    @classmethod
    def _require_mount_paths(cls, value: dict[str, str]) -> dict[str, str]:
        for path in value:
            if not path.startswith("/") or path.rstrip("/") in ("", "/tmp", "/scratch", "/checkpoints"):
                raise ValueError(f"{path} is not a path that a volume can be mounted at; write one like /data")
        return value

    @model_validator(mode="after")
    def _require_one_checkpoint_volume(self) -> "ClusterConfig":
        if self.checkpoint_claim and self.checkpoint_volume:
            raise ValueError("checkpoint_claim and checkpoint_volume are both set; remove one of them")
        return self

    @model_validator(mode="after")
    def _require_known_names(self) -> "ClusterConfig":
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"stages contains {stage}, which is not a stage; stages: {', '.join(STAGES)}")
        keys = {f"stages.{stage}": name for stage, name in self.stages.items()} | {
            "default_profile": self.default_profile
        }
        for key, name in keys.items():
            if name not in self.profiles:
                raise ValueError(
                    f"{key} is {name}, which is not a profile; profiles: {', '.join(sorted(self.profiles))}"
                )
        return self

    @model_validator(mode="after")
    def _require_launcher_for_nodes(self) -> "ClusterConfig":
        for stage in STAGES:
            name, num = self.profile_name(stage), self.profile(stage).num_nodes
            if num > 1 and stage not in PROCESS_STAGES and (stage in self.stages or stage != "checks"):
                raise ValueError(
                    f"the stage {stage} has the profile {name} with num_nodes {num}, but only {', '.join(PROCESS_STAGES)} run on "
                    f"several nodes; set stages.{stage} to a profile with one node"
                )
            if num > 1 and self.launcher == "local":
                raise ValueError(
                    f"the profile {name} of {stage} has num_nodes {num}, but launcher is local, which starts processes on one node; "
                    "set launcher to trainjob"
                )
        return self

    def profile(self, stage: str) -> Profile:
        """The profile of a stage."""
        return self.profiles[self.profile_name(stage)]

    def profile_name(self, stage: str) -> str:
        """The name of the profile of a stage. checks loads the models that evaluation loads."""
        like = "evaluation" if stage == "checks" else stage
        return self.stages.get(stage, self.stages.get(like, self.default_profile))

    def launches(self, stage: str) -> bool:
        """Whether the task of a stage starts its pods as a TrainJob, and only waits for it."""
        return self.launcher == "trainjob" and stage in PROCESS_STAGES

    def num_accelerators(self, stage: str) -> int:
        """The number of accelerators of a stage, on all its nodes."""
        profile = self.profile(stage)
        return profile.num_nodes * profile.num_accelerators


def bytes_of(quantity: str) -> int:
    """Convert a memory quantity to bytes."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def has_digest(image: str) -> bool:
    return DIGEST.search(image) is not None
