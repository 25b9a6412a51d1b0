"""Settings of the evaluation on held-out prompts and of the promotion gate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig, Confidence, Fraction, NonNegative, Positive, PositiveInt
from components.rlhf.config.checks import Checks
from components.rlhf.config.code import Digest
from components.rlhf.config.environment import Environment, check_environment, with_observations
from components.rlhf.config.judge import Judges, LinearJudge
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed
from components.rlhf.config.policy import Method
from components.rlhf.config.processes import Processes
from components.rlhf.config.rollout import EngineConfig, check_engine, ranks_per_engine


class EvaluationConfig(BaseConfig):
    """Comparison of the policy with the SFT model on held-out prompts."""

    num_prompts: PositiveInt = 256
    """Number of held-out prompts."""
    num_samples: PositiveInt = 1
    """Number of responses of each model to every prompt."""
    sampling: SamplingConfig | None = None
    """How both models sample; null uses ppo.rollout.sampling."""
    rollout: EngineConfig | None = None
    """What both models sample with; null uses the engine of ppo.rollout and its settings."""
    num_processes: PositiveInt = 1
    """Number of processes, one per GPU, that share the prompts; the stage starts them itself."""
    shard_weights: bool = False
    """Shard the models that compute log-probs and scores over the processes (DeepSpeed ZeRO-3); needs the engine vllm."""
    timeout_minutes: Positive = 30.0
    """Timeout of each step of several processes, in minutes: the responses of one model (hf: a batch), the KL, the scores."""
    num_bootstrap: PositiveInt = 2000
    """Number of bootstrap resamples of the prompts for the confidence intervals."""
    confidence: Confidence = 0.95
    """Confidence level of the intervals, between 0 and 1."""

    @model_validator(mode="after")
    def _require_a_row_per_process(self) -> "EvaluationConfig":
        rows = self.num_prompts * self.num_samples
        if rows < self.num_processes:
            raise ValueError(
                f"num_prompts x num_samples is {rows}, fewer responses than processes (num_processes, {self.num_processes}); "
                "raise num_prompts"
            )
        return self


class GateConfig(BaseConfig):
    """Conditions for the promotion of a policy."""

    min_win_rate: Fraction = 0.5
    """The lower bound of the win rate's confidence interval must be above this value."""
    max_kl: NonNegative = 10.0
    """Maximum KL divergence from the SFT model, in nats per sequence."""
    min_prompts: PositiveInt = 30
    """Least number of prompts that the judge has compared; with fewer there is no verdict, and nothing is promoted."""
    checks: Checks = ()
    """Checks beside the judge, which the policy must pass too: perplexity, prompts of your own, tasks of lm-evaluation-harness."""


class PromotionConfig(GateConfig):
    """Conditions for the promotion of a policy, and whether a person must approve of it."""

    approval: Literal["none", "required"] = "none"
    """required: a policy that fulfils the conditions becomes champion only when a person has approved of it (docs/approval.md)."""
    approval_hours: Annotated[Positive, Field(le=24 * 365)] = 72.0
    """Time limit of the approval, in hours; after it the policy is rejected."""


class EvaluationStageConfig(BaseConfig):
    stage_name: Literal["evaluation", "ppo_evaluation"] = "evaluation"  # of two tasks in one run, the last one
    method: Method = "ppo"  # that has trained the policy
    model: ModelConfig
    evaluation: EvaluationConfig
    sampling: SamplingConfig
    rollout: EngineConfig = EngineConfig()
    gate: GateConfig
    judge: Judges = LinearJudge()
    check_names: tuple[str, ...] = ()  # of the stage checks, whose rows are an input
    environment: Environment | None = None
    """That of ppo, which both models play."""
    code_digest: Digest = ""
    seed: Seed

    @property
    def processes(self) -> Processes:
        return Processes(
            number=self.evaluation.num_processes,
            key="evaluation.num_processes",
            timeout_minutes=self.evaluation.timeout_minutes,
            ranks_per_engine=ranks_per_engine(self.rollout),
        )

    @model_validator(mode="after")
    def _require_able_engine(self) -> "EvaluationStageConfig":
        keys = ("rollout", "sampling", "evaluation.num_processes")
        check_evaluation(self.evaluation, self.rollout, self.sampling, keys=keys)
        check_environment(self.environment, self.rollout, self.sampling, keys=keys[:2])
        return self

    @property
    def longest_sampling(self) -> SamplingConfig:
        """The sampling settings with max_new_tokens of the longest response, tokens of the environment included."""
        return with_observations(self.sampling, self.environment)


def check_evaluation(
    config: EvaluationConfig, rollout: EngineConfig, sampling: SamplingConfig, *, keys: tuple[str, str, str]
) -> None:
    """Raise ValueError if the engine cannot sample as the settings say, or in the processes of this stage."""
    check_engine(rollout, sampling, config.num_processes, keys=keys)
    if config.shard_weights and rollout.engine == "hf":
        raise ValueError(
            f"evaluation.shard_weights is true, but {keys[0]}.engine is hf, which samples from a whole model in each process; "
            "set evaluation.rollout to {engine: vllm}, or shard_weights to false"
        )
