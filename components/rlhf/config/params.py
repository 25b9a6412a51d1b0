"""The settings of a whole run (the params file), and the part of them that each stage receives."""

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import model_validator

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.checks import Grader, check_checks, check_inputs_of_checks
from components.rlhf.config.cluster import PROCESS_STAGES, TRAINING_STAGES, ClusterConfig
from components.rlhf.config.code import CodeConfig
from components.rlhf.config.dpo import DpoConfig, check_dpo
from components.rlhf.config.environment import check_environment
from components.rlhf.config.evaluation import EvaluationConfig, PromotionConfig, check_evaluation
from components.rlhf.config.judge import (
    EndpointJudge,
    Judges,
    LinearJudge,
    RewardModelJudge,
    as_list,
    check_judges,
)
from components.rlhf.config.model import ModelConfig, SamplingConfig, Seed, check_zero3_compatibility
from components.rlhf.config.policy import PolicyConfig
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.config.ppo_checks import check_reference
from components.rlhf.config.prepare_data import DataConfig, SplitWeights
from components.rlhf.config.reward_model import RewardModelConfig, check_calibration
from components.rlhf.config.rewards import EndpointReward, HttpReward, Rewards
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.config.scoring import RUNS_USER_CODE, VERIFIABLE, Endpoint, column_of
from components.rlhf.config.sft import SftConfig
from components.rlhf.config.storage import CheckpointConfig, StorageConfig, TrackingConfig

StageConfig = TypeVar("StageConfig", bound=BaseConfig)
JUDGING_STAGES = ("judge", "evaluation")  # the stages that ask judges


class Params(BaseConfig):
    """Settings of one run of the pipeline."""

    preset: str = "custom"
    """Name of the preset, which is shown in summaries."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    judge: Judges = LinearJudge()
    """One judge or a list of judges; the first one decides at the gate."""
    policy: PolicyConfig = PolicyConfig()
    ppo: PpoConfig = PpoConfig()
    dpo: DpoConfig = DpoConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: PromotionConfig = PromotionConfig()
    code: CodeConfig = CodeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()
    cluster: ClusterConfig = ClusterConfig()
    seed: Seed = 0
    """Random seed of the data splits, data order, new heads and all sampling."""

    @model_validator(mode="after")
    def _require_consistent_stages(self) -> "Params":
        if self.data.demonstrations is None and self.sft.use is None:
            raise ValueError("data.demonstrations is missing; set it, or set sft.use to your own model")
        for section in (self.sft, self.reward_model):
            check_zero3_compatibility(self.model, section.training)
        if self.data.max_prompt_tokens >= self.data.max_tokens:
            raise ValueError("data.max_prompt_tokens leaves no tokens for a completion; raise data.max_tokens above it")
        return self

    @model_validator(mode="after")
    def _require_consistent_ppo(self) -> "Params":
        if not self.runs("ppo"):
            return self
        check_zero3_compatibility(self.model, self.ppo.training, head_only=self.ppo.critic.trains == "head")
        check_reference(self.model, self.ppo)
        if self.data.demonstrations is None and self.ppo.ptx_coef:
            raise ValueError(
                "ppo.ptx_coef mixes in the loss on demonstrations, and there are none; set data.demonstrations"
            )
        if self.ppo.keep == "best" and not self.data.num_validation_prompts:
            raise ValueError(
                "ppo.keep is best, which evaluations on the validation prompts find; set data.num_validation_prompts above 0"
            )
        return self

    @model_validator(mode="after")
    def _require_consistent_dpo(self) -> "Params":
        if self.runs("dpo"):
            check_zero3_compatibility(self.model, self.dpo.training)
            check_dpo(self.dpo, self.data)
            if self.ppo.environment:
                raise ValueError(
                    f"ppo.environment plays turns, which DPO does not learn, and policy.method is {self.policy.method}; set it to ppo, or "
                    "remove ppo.environment"
                )
        elif self.dpo != DpoConfig() and "policy" not in self.model_fields_set:
            raise ValueError(
                "dpo has settings, but the policy is trained by PPO unless policy.method says otherwise; set policy.method to dpo or both, "
                "or to ppo to keep the settings for later"
            )
        return self

    @model_validator(mode="after")
    def _require_data_of_rewards_and_judges(self) -> "Params":
        if self.data.preferences is None:
            for key, reason in self._needs_of_preferences():
                raise ValueError(f"data.preferences is missing, and {key} {reason}; set it")
        for role, is_needed in self._roles_of_preferences().items():
            if is_needed and getattr(self.data.weights, role) == 0:
                reader = (
                    "stage dpo" if role == "reward_model" and not self.uses_reward_model else role.replace("_", " ")
                )
                raise ValueError(
                    f"data.weights.{role} is 0, which leaves no preferences for the {reader} of this run; raise it"
                )
        for key, section in self.keyed_rewards_and_judges().items():
            column = column_of(section)
            if column is not None and not self.data.keeps(column):
                raise ValueError(
                    f"{key} reads the column {column}, which data.prompts does not keep; add it to data.prompts.keep, or correct "
                    f"{key}.column"
                )
        return self

    @model_validator(mode="after")
    def _require_used_reward_model(self) -> "Params":
        if self.reward_model.use and not self.uses_reward_model:
            reason = "ppo.rewards has no reward of kind reward_model; add one"
            if not self.runs("ppo"):
                reason = "policy.method is dpo, which learns without a reward model; set it to ppo or both"
            raise ValueError(f"reward_model.use is {self.reward_model.use}, but {reason}, or remove use")
        return self

    def _needs_of_preferences(self) -> Iterator[tuple[str, str]]:
        """Key and reason of each part of the run that needs data.preferences."""
        if self.uses_reward_model:
            yield "ppo.rewards", "has the reward model, which is trained or measured on preferences"
        for key, judge in self.keyed_judges().items():
            if not isinstance(judge, VERIFIABLE):
                yield (
                    key,
                    "is compared with people's preferences; a judge that verifies answers, such as exact_match, needs none",
                )

    @model_validator(mode="after")
    def _require_able_engines(self) -> "Params":
        rollout, sampling = self.ppo.rollout, self.ppo.rollout.sampling
        keys = ("ppo.rollout", "ppo.rollout.sampling", "reward_model.training.num_processes")
        if self.uses_reward_model:
            check_calibration(self.reward_model, rollout, sampling, keys=keys)
        rollout_key = "evaluation.rollout" if self.evaluation.rollout else "ppo.rollout"
        sampling_key = "evaluation.sampling" if self.evaluation.sampling else "ppo.rollout.sampling"
        keys = (rollout_key, sampling_key, "evaluation.num_processes")
        check_evaluation(self.evaluation, self.evaluation_rollout, self.evaluation_sampling, keys=keys)
        check_environment(self.ppo.environment, self.evaluation_rollout, self.evaluation_sampling, keys=keys[:2])
        if self.ppo.environment and self.uses_reward_model and self.reward_model.num_calibration_samples:
            raise ValueError(
                "reward_model.num_calibration_samples measures the rewards of responses without the environment (ppo.environment); "
                "set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_judges(self) -> "Params":
        check_judges(self.judge)
        second = self.reward_model_judge
        if second and second.use and second.use == self.reward_model.use:
            raise ValueError(f"judge.use is {second.use}, the reward model that PPO is trained with; use another one")
        return self

    @model_validator(mode="after")
    def _check_checks(self) -> "Params":
        check_checks(self.gate.checks, self.evaluation.confidence, key="gate.checks")
        check_inputs_of_checks(
            self.gate.checks, has_demonstrations=self.data.demonstrations is not None, has_code=self.code.is_given
        )
        if self.gate.checks and self.cluster.profile("checks").num_nodes > 1:
            raise ValueError(
                f"gate.checks run in one pod, and the profile {self.cluster.profile_name('checks')} has several nodes; set "
                "cluster.stages.checks to a profile with one"
            )
        return self

    @model_validator(mode="after")
    def _require_one_process_per_accelerator(self) -> "Params":
        for stage in PROCESS_STAGES:
            section, num = getattr(self, stage), self.cluster.num_accelerators(stage)
            if not self.runs(stage):
                continue
            key, section = (f"{stage}.training", section.training) if stage != "evaluation" else (stage, section)
            profile, number = self.cluster.profile_name(stage), section.num_processes
            if num and number != num:
                raise ValueError(
                    f"{key}.num_processes is {number}, and the profile {profile} has {num} accelerators; remove num_processes"
                )
            nodes = self.cluster.profile(stage).num_nodes
            if number % nodes:
                raise ValueError(
                    f"{key}.num_processes is {number}, which is no multiple of the {nodes} nodes of the profile {profile}; "
                    "remove num_processes"
                )
        return self

    @model_validator(mode="after")
    def _require_prices_for_budget(self) -> "Params":
        for stage in TRAINING_STAGES:
            if (
                self.cluster.budget is not None
                and self.cluster.profile(stage).price_per_hour is None
                and self.runs(stage)
            ):
                profile = self.cluster.profile_name(stage)
                raise ValueError(
                    f"cluster.budget is {self.cluster.budget:g}, but the price of {stage} is unknown; set "
                    f"cluster.profiles.{profile}.price_per_hour"
                )
        return self

    @property
    def uses_reward_model(self) -> bool:
        """Whether PPO is part of the run and is rewarded by the reward model."""
        return "ppo" in self.policy.methods and self.ppo.uses_reward_model

    def runs(self, stage: str) -> bool:
        """Whether a stage of training is part of the run."""
        trains_judge = self.reward_model_judge is not None
        return {
            "sft": self.sft.use is None,
            "reward_model": self.uses_reward_model or trains_judge,
            "ppo": "ppo" in self.policy.methods,
            "dpo": "dpo" in self.policy.methods,
            "checks": bool(self.gate.checks),
        }.get(stage, True)

    @property
    def runs_user_code(self) -> dict[str, str]:
        """The keys of everything in this run that is the user's own program, with what it is."""
        found = {
            key: section.kind
            for key, section in self.keyed_rewards_and_judges().items()
            if isinstance(section, RUNS_USER_CODE)
        }
        return found | ({"code.path": "folder"} if self.code.is_given else {})

    def keyed_judges(self) -> dict[str, Any]:
        """The judges by their keys in a params file: judge, or judge.0 in a list."""
        keys = [f"judge.{n}" for n in range(len(as_list(self.judge)))] if isinstance(self.judge, tuple) else ["judge"]
        return dict(zip(keys, as_list(self.judge), strict=True))

    def keyed_rewards_and_judges(self) -> dict[str, Any]:
        """The rewards, the environment if there is one, and the judges, by their keys in a params file."""
        rewards: dict[str, Any] = {f"ppo.rewards.{number}": reward for number, reward in enumerate(self.rewards)}
        environment = {"ppo.environment": self.ppo.environment} if self.ppo.environment else {}
        return rewards | environment | self.keyed_judges()

    @property
    def rewards(self) -> Rewards:
        """The rewards of the run; without PPO it has none."""
        return self.ppo.rewards if self.runs("ppo") else ()

    @property
    def evaluation_rollout(self) -> EngineConfig:
        """The engine that the evaluation samples with."""
        return self.evaluation.rollout or self._ppo_engine

    @property
    def evaluation_sampling(self) -> SamplingConfig:
        """How the evaluation samples."""
        return self.evaluation.sampling or self.ppo.rollout.sampling

    @property
    def calibrates_with_vllm(self) -> bool:
        """Whether the reward model stage samples with vLLM."""
        samples = self.uses_reward_model and self.reward_model.num_calibration_samples > 0
        return samples and self.ppo.rollout.engine == "vllm"

    @property
    def _ppo_engine(self) -> EngineConfig:
        return EngineConfig(engine=self.ppo.rollout.engine, vllm=self.ppo.rollout.vllm)

    @property
    def reward_model_judge(self) -> RewardModelJudge | None:
        """The judge that is a second reward model."""
        return next((judge for judge in as_list(self.judge) if isinstance(judge, RewardModelJudge)), None)

    @property
    def endpoint_judges(self) -> tuple[EndpointJudge, ...]:
        """The judges behind an API."""
        return tuple(judge for judge in as_list(self.judge) if isinstance(judge, EndpointJudge))

    def asked_by(self, stage: str) -> tuple[EndpointJudge | EndpointReward | HttpReward | Grader, ...]:
        """The judges, rewards or graders of checks that a stage asks over the network."""
        if stage == "checks":
            return tuple(grader for check in self.gate.checks if (grader := getattr(check, "endpoint", None)))
        if stage in JUDGING_STAGES:
            return self.endpoint_judges
        rewards = self.rewards if stage == "ppo" else ()
        return tuple(reward for reward in rewards if isinstance(reward, EndpointReward | HttpReward))

    @property
    def all_asked(self) -> tuple[EndpointJudge | EndpointReward | HttpReward | Grader, ...]:
        """All judges, rewards and graders that are asked over the network."""
        return self.endpoint_judges + self.asked_by("ppo") + self.asked_by("checks")

    @property
    def keeps_answers(self) -> bool:
        """Whether any of them keeps its answers in storage.answers_uri."""
        return any(isinstance(asked, Endpoint) for asked in self.all_asked)

    @property
    def _weights(self) -> SplitWeights:
        """The shares of the roles, without those that nothing in this run is trained on."""
        update = {role: 0.0 for role, is_needed in self._roles_of_preferences().items() if not is_needed}
        return self.data.weights.model_copy(update=update)

    def _roles_of_preferences(self) -> dict[str, bool]:
        """Whether this run needs preferences for its reward model or DPO, and for its judge, by the keys of data.weights."""
        needs_pairs = any(not isinstance(judge, VERIFIABLE) for judge in as_list(self.judge))
        return {"reward_model": self.uses_reward_model or self.runs("dpo"), "judge": needs_pairs}

    def stage(self, config_class: type[StageConfig]) -> StageConfig:
        """The settings of one stage: only the sections that are fields of its config class."""
        sections: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        sections["num_evaluation_prompts"] = self.evaluation.num_prompts
        sections["environment"] = self.ppo.environment
        sections["code_digest"] = self.code.digest
        sections["data"] = self.data.model_copy(update={"weights": self._weights})
        sections["method"] = self.policy.methods[0]
        sections["gate"] = self.gate.model_copy(update={"checks": ()})  # whose texts evaluation does not need
        sections["checks"] = self.gate.checks
        sections["check_names"] = tuple(check.title for check in self.gate.checks)
        sections["template_date"] = self.data.template_date
        sections["num_bootstrap"], sections["confidence"] = self.evaluation.num_bootstrap, self.evaluation.confidence
        sections["max_kl"] = self.gate.max_kl if self.ppo.has_kl_limit else None
        # The reward model is calibrated on PPO's distribution, with its engine if there is something to sample.
        calibrates = self.reward_model.num_calibration_samples > 0
        sections |= {
            "sampling": self.ppo.rollout.sampling,
            "rollout": self._ppo_engine if calibrates else EngineConfig(),
        }
        if "budget" in config_class.model_fields:
            profile = self.cluster.profile(next(name for name in TRAINING_STAGES if name in config_class.model_fields))
            sections["budget"] = BudgetConfig(limit=self.cluster.budget, price_per_hour=profile.price_per_hour or 0.0)
        if "evaluation" in config_class.model_fields or "checks" in config_class.model_fields:
            sections |= {"sampling": self.evaluation_sampling, "rollout": self.evaluation_rollout}
        return config_class(**{name: sections[name] for name in config_class.model_fields if name in sections})
