"""Settings of ppo."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig, Count, Fraction, NonNegative, Positive, PositiveInt
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.code import Digest
from components.rlhf.config.environment import Environment, check_environment, with_observations
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed, TrainingConfig, check_zero3_compatibility
from components.rlhf.config.ppo_checks import check_algorithm, check_reference, check_values
from components.rlhf.config.processes import Processes
from components.rlhf.config.rewards import RewardModelReward, Rewards, check_rewards, uses_reward_model
from components.rlhf.config.rollout import RolloutConfig, check_engine, ranks_per_engine
from components.rlhf.config.storage import CheckpointConfig


class CriticConfig(BaseConfig):
    """The critic (value model) of the advantage estimator gae, initialized from the reward model."""

    trains: Literal["layers", "head"] = "layers"
    """layers trains all weights that are not frozen; head only the scalar head, on features computed once per rollout."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of the critic."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """Learning rate schedule of the critic; null uses that of training."""
    warmup_fraction: Fraction | None = None
    """Fraction of all steps in which the critic's learning rate rises linearly from 0; null uses that of training."""
    warmup_iterations: Count = 0
    """First iterations in which only the critic is trained; the actor stays as it is, and is not evaluated."""
    loss_coef: Positive = 1.0
    """Factor of the value loss; AdamW ignores it except for gradient clipping (max_grad_norm)."""


class RejectionConfig(BaseConfig):
    """Leaves tokens or whole responses out of the losses whose log-probs of trainer and rollout engine differ too much."""

    statistic: Literal[
        "token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
        "seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3",
    ]  # fmt: skip
    """KL estimator of the gap (k1, k2, k3), per token or as the sum, mean or maximum of a response (verl's names)."""
    high: Positive
    """Upper bound: for k1 of the ratio of the probabilities, engine to trainer; for k2 and k3 of the statistic itself."""
    low: Positive | None = None
    """Lower bound of the ratio for k1; null is 1 / high."""

    @model_validator(mode="after")
    def _require_ordered_bounds(self) -> "RejectionConfig":
        if self.low is not None and not self.statistic.endswith("k1"):
            raise ValueError(
                f"low is set, but {self.statistic} is never negative and has only an upper bound; remove it"
            )
        if (1 / self.high if self.low is None else self.low) > self.high:
            raise ValueError(f"low is above high, {self.high}; swap them, or raise high above 1")
        return self


class ReferenceConfig(BaseConfig):
    """The reference of the KL penalty: the SFT model, unless it follows the actor."""

    update_every: Count = 0
    """Iterations after which the reference is moved to the actor; 0 keeps the SFT model."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the old reference in the new one: 0 replaces it by the actor, above 0 it is a moving average (EMA)."""


AdvantageEstimator = Literal["gae", "reinforce++", "reinforce++-baseline", "rloo", "group_norm", "dr_grpo", "remax"]
GROUP_ESTIMATORS = ("reinforce++-baseline", "rloo", "group_norm", "dr_grpo")  # compare the responses to one prompt
WHITENED_ESTIMATORS = ("gae", "reinforce++", "reinforce++-baseline")


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
    rewards: Rewards = (RewardModelReward(),)
    """What responses are rewarded for: one reward or a list, of which the weighted sum is maximized."""
    environment: Environment | None = None
    """What answers each turn of the model, in the evaluation too; null is none, and responses have a single turn."""
    kl_coef: NonNegative = 0.05
    """Coefficient of the KL penalty in the reward; the initial value if kl_target is set."""
    reference: ReferenceConfig = ReferenceConfig()
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the KL penalty is subtracted from the reward of every token, or added to the policy loss (GRPO)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL penalty (k1, k2 or k3 of Schulman 2020); in the loss, k2 or k3."""
    kl_clamp: Positive | None = None
    """The KL penalty of a token is clamped to +-kl_clamp nats, such as 10; null does not clamp it."""
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
    advantage: AdvantageEstimator = "gae"
    """Advantage estimator: gae with a critic; without one, group_norm is GRPO's, and remax samples a greedy response as the baseline."""
    drop_equal_groups: bool = False
    """Leave prompts whose responses all have the same reward out of the losses; for estimators that compare the responses to a prompt."""
    mask_truncated: bool = False
    """Leave truncated responses out of the losses (overlong filtering of DAPO)."""
    gamma: Fraction = 1.0
    """Discount factor, between 0 and 1."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalized advantage estimation (GAE), between 0 and 1."""
    whiten_advantages: bool = True
    """Whiten the advantages of gae and of both reinforce++ to mean 0 and variance 1 over the whole rollout batch."""
    policy_ratio: Literal["token", "gspo", "gspo-token", "cispo"] = "token"
    """Probability ratio: of each token (PPO), of the sequence (GSPO and GSPO-token), or as a clipped weight without gradient (CISPO)."""
    clip_range: Fraction = 0.2
    """Clip range of the probability ratio around 1."""
    clip_range_high: Positive | None = None
    """Clip range above 1 (DAPO's clip-higher), at least clip_range; null is clip_range."""
    dual_clip: Positive | None = None
    """Dual-clip constant, above 1, that bounds the loss of negative advantages; null disables dual clipping."""
    value_clip_range: Positive | None = 0.2
    """Clip range of the critic's values around the old values; null disables clipping."""
    entropy_coef: NonNegative = 0.0
    """Coefficient of the entropy bonus: the mean entropy of a token, times this, is subtracted from the policy loss."""
    ptx_coef: NonNegative = 0.0
    """Coefficient of the loss on demonstrations that is mixed into every step of the actor, with a minibatch of them; 0 mixes in none."""
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """Log-probs of the sampling policy: of the trainer, or of the rollout engine as it sampled, which saves a forward pass."""
    importance_clip: tuple[Positive, Positive] | None = None
    """Bounds, such as [0.5, 5], of importance weights for the mismatch of trainer and rollout engine; null disables them."""
    importance_mode: Literal["truncate", "mask", "sequence-truncate", "sequence-mask"] = "truncate"
    """Whether importance weights beyond the bounds are clamped or become 0, and whether the bounds apply to tokens or sequences."""
    rejection: RejectionConfig | None = None
    """Which tokens or responses are left out of the losses for the mismatch of trainer and rollout engine; null is none."""
    loss_aggregation: Literal["token-mean", "sequence-mean", "sequence-sum", "sequence-sum-norm"] = "token-mean"
    """Mean over all tokens, or over sequences of their mean, their sum, or their sum over the longest response possible (Dr. GRPO)."""
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

    @property
    def uses_reward_model(self) -> bool:
        """Whether the reward model is one of the rewards."""
        return uses_reward_model(self.rewards)

    @property
    def longest_sampling(self) -> SamplingConfig:
        """The sampling settings with max_new_tokens of the longest response, tokens of the environment included."""
        return with_observations(self.rollout.sampling, self.environment)

    @model_validator(mode="after")
    def _check_rewards(self) -> "PpoConfig":
        check_rewards(self.rewards, self.rollout.sampling.max_new_tokens, has_environment=self.environment is not None)
        return self

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
        check_algorithm(self)
        check_engine(
            self.rollout,
            self.rollout.sampling,
            self.training.num_processes,
            keys=("rollout", "rollout.sampling", "training.num_processes"),
        )
        check_values(self)
        check_environment(self.environment, self.rollout, self.rollout.sampling, keys=("rollout", "rollout.sampling"))
        return self


class PpoStageConfig(BaseConfig):
    model: ModelConfig
    ppo: PpoConfig
    checkpoint: CheckpointConfig
    budget: BudgetConfig = BudgetConfig()
    code_digest: Digest = ""
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
        check_reference(self.model, self.ppo)
        check_zero3_compatibility(self.model, self.ppo.training, head_only=self.ppo.critic.trains == "head")
        return self
