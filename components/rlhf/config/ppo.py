"""Settings of PPO."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, Positive, PositiveInt
from components.rlhf.config.model import (
    ModelConfig,
    SamplingConfig,
    Seed,
    TrainingConfig,
    reject_zero3_with_shared_weights,
)
from components.rlhf.config.storage import CheckpointConfig


class VllmConfig(BaseConfig):
    """vLLM inside each training process."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of a GPU's memory for weights and cache while it generates; it sleeps during updates."""
    kv_cache_gib: Positive = 1.0
    """Size of the cache on a CPU."""
    tensor_parallel_size: PositiveInt = 1
    """Neighbouring processes that hold one engine together."""


class RolloutConfig(BaseConfig):
    """What one iteration samples."""

    engine: Literal["hf", "vllm"] = "hf"
    """What generates: transformers or vLLM, inside each training process."""
    vllm: VllmConfig = VllmConfig()
    """Of the engine vllm."""
    num_prompts: PositiveInt = 64
    """Prompts in one iteration."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt; rollout_batch = num_prompts x samples_per_prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature and lengths."""


class CriticConfig(BaseConfig):
    """The value model, started from the reward model."""

    trains: Literal["layers", "head"] = "layers"
    """layers: whatever is not frozen; head: only the scalar head, on features that are computed once per rollout."""
    learning_rate: Positive = 1e-5
    """Peak of the critic's schedule."""


class PpoConfig(BaseConfig):
    """Proximal policy optimisation with a per-token KL penalty to the fine-tuned model."""

    num_iterations: PositiveInt = 100
    """Rounds of rollout and update at the most."""
    rollout: RolloutConfig = RolloutConfig()
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    minibatch: PositiveInt = 32
    """Responses in one optimiser step."""
    training: TrainingConfig = TrainingConfig(learning_rate=1e-6)
    """Engine and optimiser of the actor; the critic differs only in its learning rate."""
    critic: CriticConfig = CriticConfig()
    kl_coef: NonNegative = 0.05
    """Weight of the KL penalty in the reward; the start of it where kl_target is set."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate that is penalised."""
    kl_target: Positive | None = None
    """Nats per sequence that an adaptive coefficient steers to; null keeps kl_coef fixed."""
    kl_horizon: Positive = 10000
    """Samples over which the adaptive coefficient can change by a fifth of its error."""
    normalize_reward: bool = True
    """Score in units of the fine-tuned model's own mean and spread, as the reward model's artifact has them."""
    reward_clip: Positive | None = 10.0
    """Bound of the normalised score, before the KL penalty."""
    missing_eos_penalty: NonNegative = 0.0
    """Taken off the normalised score of a truncated response."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """Of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Advantages have mean 0 and variance 1 over the whole rollout batch."""
    clip_range: Fraction = 0.2
    """The ratio may move this far from 1."""
    clip_range_high: Positive | None = None
    """A wider upper bound; null is clip_range."""
    dual_clip: Positive | None = None
    """Bound c of the loss at negative advantages, above 1; null is none."""
    value_clip_range: Positive | None = 0.2
    """The value may move this far from the old one; null is unclipped."""
    importance_clip: tuple[Positive, Positive] | None = None
    """Weigh each token by how much likelier the trainer holds it than the rollout engine, within these bounds ([0.5, 5]); null is off."""
    loss_aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    """sequence-mean is OpenRLHF v0.5.5's."""
    eval_every: Count = 0
    """Iterations between looks at the validation prompts; 0 is never."""
    patience: Count = 0
    """Stop after this many looks without a better score less its KL cost; 0 never stops early."""

    @model_validator(mode="after")
    def _batches(self) -> "PpoConfig":
        batch = self.rollout.num_prompts * self.rollout.samples_per_prompt
        if batch % self.minibatch:
            raise ValueError(
                f"minibatch is {self.minibatch}, which does not divide the rollout batch of {batch} "
                "(rollout.num_prompts x rollout.samples_per_prompt); choose a divisor"
            )
        if self.minibatch % self.training.num_processes:
            raise ValueError(
                f"minibatch is {self.minibatch}, which {self.training.num_processes} processes (training.num_processes) cannot "
                "share equally; choose a multiple"
            )
        vllm, temperature = self.rollout.vllm, self.rollout.sampling.temperature
        if self.rollout.engine == "vllm" and self.training.num_processes % vllm.tensor_parallel_size:
            raise ValueError(
                f"rollout.vllm.tensor_parallel_size is {vllm.tensor_parallel_size}, which does not divide "
                f"training.num_processes, {self.training.num_processes}; choose a divisor"
            )
        if self.rollout.engine == "vllm" and not 0.01 <= temperature <= 2:
            raise ValueError(
                f"rollout.sampling.temperature is {temperature}, and vLLM samples between 0.01 and 2; choose one of these"
            )
        if self.patience and not self.eval_every:
            raise ValueError("patience needs looks at the validation prompts; set eval_every above 0")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; a bound of the loss must be above 1")
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            raise ValueError("clip_range_high is below clip_range; it widens the upper bound or is null")
        if self.importance_clip is not None and self.importance_clip[0] > self.importance_clip[1]:
            low, high = self.importance_clip
            raise ValueError(f"importance_clip is [{low}, {high}], with the lower bound above the upper; swap them")
        return self


class PpoStageConfig(BaseConfig):
    model: ModelConfig
    ppo: PpoConfig
    checkpoint: CheckpointConfig
    seed: Seed

    @model_validator(mode="after")
    def _weights(self) -> "PpoStageConfig":
        reject_zero3_with_shared_weights(self.model, self.ppo.training, head_only=self.ppo.critic.trains == "head")
        return self
