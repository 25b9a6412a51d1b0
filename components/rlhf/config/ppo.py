"""Settings of ppo."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, Positive, PositiveInt
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed, TrainingConfig, check_zero3_compatibility
from components.rlhf.config.processes import Processes
from components.rlhf.config.storage import CheckpointConfig


class VllmConfig(BaseConfig):
    """vLLM, colocated with each training process."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Fraction of GPU memory for vLLM's weights and KV cache during rollouts; vLLM sleeps during updates."""
    kv_cache_gib: Positive = 1.0
    """Size of the KV cache on CPU, in GiB."""
    tensor_parallel_size: PositiveInt = 1
    """Number of consecutive ranks that share one vLLM engine by tensor parallelism; divides the number of processes."""


class EngineConfig(BaseConfig):
    """What samples responses."""

    engine: Literal["hf", "vllm"] = "hf"
    """Rollout engine, in each process: hf (transformers) or vllm."""
    vllm: VllmConfig = VllmConfig()


class RolloutConfig(EngineConfig):
    """Generation of the responses of one iteration."""

    num_prompts: PositiveInt = 64
    """Number of prompts per iteration, over all processes."""
    samples_per_prompt: PositiveInt = 1
    """Number of responses per prompt; the rollout batch is num_prompts x samples_per_prompt."""
    sampling: SamplingConfig = SamplingConfig()


def check_engine(
    rollout: EngineConfig, sampling: SamplingConfig, num_processes: int, *, keys: tuple[str, str, str]
) -> None:
    """Raise ValueError for what vLLM cannot do. keys are those of the three settings, for the message."""
    if rollout.engine != "vllm":
        return
    size, (rollout_key, sampling_key, processes_key) = rollout.vllm.tensor_parallel_size, keys
    if num_processes % size:
        raise ValueError(
            f"{rollout_key}.vllm.tensor_parallel_size is {size}, which does not divide {processes_key}, {num_processes}; "
            "choose a divisor"
        )
    if not 0.01 <= sampling.temperature <= 2:
        raise ValueError(
            f"{sampling_key}.temperature is {sampling.temperature}, but vLLM supports 0.01 to 2; choose a value in this range"
        )


def ranks_per_engine(rollout: EngineConfig) -> int:
    """Number of consecutive ranks that share an engine."""
    return rollout.vllm.tensor_parallel_size if rollout.engine == "vllm" else 1


class CriticConfig(BaseConfig):
    """The critic (value model), initialized from the reward model."""

    trains: Literal["layers", "head"] = "layers"
    """layers trains all weights that are not frozen; head only the scalar head, on features computed once per rollout."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of the critic."""


class GuardConfig(BaseConfig):
    """What ends or turns back a run whose policy collapses, before the update on such a rollout."""

    action: Literal["off", "stop", "rollback"] = "off"
    """stop ends the run with its kept policy; rollback returns to the last good state with half the learning rates."""
    max_kl: Positive | None = None
    """Largest KL of a rollout to the SFT model, in nats per sequence; null is gate.max_kl."""
    min_entropy: Fraction = 0.1
    """Least entropy of a rollout, as a fraction of that of the first one; 0 disables it."""
    min_eos_rate: Fraction = 0.5
    """Least share of responses that end, as a fraction of the first rollout's, if a tenth of those ended; 0 disables it."""
    keep_every: PositiveInt = 10
    """Iterations between the states that rollback returns to, on disk like checkpoints."""
    max_rollbacks: PositiveInt = 3
    """Number of rollbacks after which the run stops."""


class PpoConfig(BaseConfig):
    """Proximal policy optimization with a per-token KL penalty to the SFT model."""

    num_iterations: PositiveInt = 100
    """Maximum number of iterations of rollout and update."""
    rollout: RolloutConfig = RolloutConfig()
    num_epochs: PositiveInt = 1
    """Number of epochs over each rollout batch."""
    minibatch: PositiveInt = 32
    """Responses per optimizer step, over all processes; divides the rollout batch."""
    training: TrainingConfig = TrainingConfig(learning_rate=1e-6)
    critic: CriticConfig = CriticConfig()
    kl_coef: NonNegative = 0.05
    """Coefficient of the KL penalty in the reward; the initial value if kl_target is set."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL penalty (k1, k2 or k3 of Schulman 2020)."""
    kl_target: Positive | None = None
    """Target of the adaptive KL controller, in nats per sequence or token; null keeps kl_coef constant."""
    kl_target_per: Literal["sequence", "token"] = "sequence"
    """Whether kl_target is the KL of a sequence (Ziegler et al. 2019), or the mean over its tokens (OpenRLHF, verl)."""
    kl_horizon: Positive = 10000
    """Horizon of the adaptive KL controller, in samples; larger values adapt kl_coef more slowly."""
    normalize_reward: bool = True
    """Normalize rewards with the mean and standard deviation stored in the reward model."""
    reward_clip: Positive | None = 10.0
    """Rewards are clipped to +-reward_clip before the KL penalty is added; null disables clipping."""
    missing_eos_penalty: NonNegative = 0.0
    """Penalty that is subtracted from the reward of a truncated response."""
    gamma: Fraction = 1.0
    """Discount factor, between 0 and 1."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalized advantage estimation (GAE), between 0 and 1."""
    whiten_advantages: bool = True
    """Whiten advantages to mean 0 and variance 1 over the whole rollout batch."""
    clip_range: Fraction = 0.2
    """Clip range of the probability ratio around 1."""
    clip_range_high: Positive | None = None
    """Clip range above 1 (DAPO's clip-higher), at least clip_range; null is clip_range."""
    dual_clip: Positive | None = None
    """Dual-clip constant, above 1, that bounds the loss of negative advantages; null disables dual clipping."""
    value_clip_range: Positive | None = 0.2
    """Clip range of the critic's values around the old values; null disables clipping."""
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """Log-probs of the sampling policy: of the trainer, or of the rollout engine as it sampled, which saves a forward pass."""
    importance_clip: tuple[Positive, Positive] | None = None
    """Bounds, such as [0.5, 5], of per-token importance weights for the mismatch of trainer and rollout engine; null disables them."""
    loss_aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    """Average the loss over all tokens, or over the tokens of each sequence and then over sequences (OpenRLHF v0.5.5)."""
    eval_every: Count = 0
    """Iterations between evaluations on the validation prompts; 0 disables them."""
    patience: Count = 0
    """Stop after this many evaluations without improvement of the validation objective; 0 disables early stopping."""
    keep: Literal["best", "last"] | None = None
    """Policy to export: best validation objective within gate.max_kl, or last; null is best with eval_every, otherwise last."""
    guard: GuardConfig = GuardConfig()

    @property
    def keeps_best(self) -> bool:
        """Whether the exported policy is chosen by the evaluations on the validation prompts."""
        return self.keep == "best" or (self.keep is None and self.eval_every > 0)

    @property
    def has_kl_limit(self) -> bool:
        """Whether gate.max_kl affects the training."""
        return self.keeps_best or self.guard.action != "off"

    @model_validator(mode="after")
    def _require_consistent_values(self) -> "PpoConfig":
        batch = self.rollout.num_prompts * self.rollout.samples_per_prompt
        if batch % self.minibatch:
            raise ValueError(
                f"minibatch is {self.minibatch}, which does not divide the rollout batch of {batch} "
                "(rollout.num_prompts x rollout.samples_per_prompt); choose a divisor"
            )
        if self.minibatch % self.training.num_processes:
            raise ValueError(
                f"minibatch is {self.minibatch}, which {self.training.num_processes} processes (training.num_processes) cannot "
                "share equally; choose a multiple of num_processes"
            )
        check_engine(
            self.rollout,
            self.rollout.sampling,
            self.training.num_processes,
            keys=("rollout", "rollout.sampling", "training.num_processes"),
        )
        if self.patience and not self.eval_every:
            raise ValueError("patience counts evaluations on the validation prompts; set eval_every above 0")
        if self.keep == "best" and not self.eval_every:
            raise ValueError("keep is best, which evaluations on the validation prompts find; set eval_every above 0")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_target adapts kl_coef by factors, and kl_coef is 0; set it above 0, or kl_target to null"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip is {self.dual_clip}, but must be above 1")
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            raise ValueError("clip_range_high is below clip_range; raise it, or set it to null")
        if self.importance_clip is not None and self.old_logprobs == "engine":
            raise ValueError(
                "importance_clip corrects for the difference between the log-probs of trainer and engine; "
                "with old_logprobs engine there is none, so set it to null"
            )
        if self.importance_clip is not None and self.importance_clip[0] > self.importance_clip[1]:
            low, high = self.importance_clip
            raise ValueError(
                f"importance_clip is [{low}, {high}], with the lower bound above the upper bound; swap them"
            )
        return self


class PpoStageConfig(BaseConfig):
    model: ModelConfig
    ppo: PpoConfig
    checkpoint: CheckpointConfig
    budget: BudgetConfig = BudgetConfig()
    seed: Seed
    max_kl: NonNegative | None = None
    """Largest KL of the exported policy to the SFT model, in nats per sequence (gate.max_kl); null is no limit."""

    @property
    def processes(self) -> Processes:
        training = self.ppo.training
        return Processes(
            number=training.num_processes,
            key="ppo.training.num_processes",
            timeout_minutes=training.timeout_minutes,
            ranks_per_engine=ranks_per_engine(self.ppo.rollout),
        )

    @model_validator(mode="after")
    def _require_unshared_weights(self) -> "PpoStageConfig":
        check_zero3_compatibility(self.model, self.ppo.training, head_only=self.ppo.critic.trains == "head")
        return self
