"""What is measured: stages, sizes, and settings that change what a process holds."""

from dataclasses import dataclass, field
from typing import Any

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.dpo import DpoConfig, DpoStageConfig
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.judge import RewardModelJudge
from components.rlhf.config.model import ModelConfig, SamplingConfig
from components.rlhf.config.ppo import CriticConfig, PpoConfig, PpoStageConfig
from components.rlhf.config.reward_model import RewardModelConfig, RewardModelStageConfig
from components.rlhf.config.rollout import EngineConfig, RolloutConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.planner.copies import Numeric
from components.rlhf.planner.jobs import Job
from components.rlhf.planner.other_stages import plan_evaluation
from components.rlhf.planner.phases import StagePlan
from components.rlhf.planner.ppo_stage import plan_ppo
from components.rlhf.planner.sources import shape_from
from components.rlhf.planner.training_stages import plan_dpo, plan_reward_model, plan_sft

PROMPT_TOKENS, MAX_TOKENS, NEW_TOKENS = 32, 256, 96  # one token per character
JUDGE = RewardModelJudge(kind="reward_model")
SHAPES = {  # hidden size, layers, heads, vocabulary
    "60M": (512, 16, 8, 16_384),
    "150M": (768, 18, 12, 32_768),
    "300M": (1024, 22, 16, 32_768),
}


def config_of(size: str) -> dict[str, Any]:
    """The entries of config.json of a model of this size."""
    hidden, layers, heads, vocabulary = SHAPES[size]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a stage. Its label says what differs from plain torch in fp32 with all layers trained."""

    stage: str
    size: str
    label: str = "plain"
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    critic: dict[str, Any] = field(default_factory=dict)
    ppo: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)  # engine of the evaluation
    checkpoints: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage} {self.size} {self.label}"

    def config(self) -> BaseConfig:
        """The settings of the stage: two steps, in passes of 512 tokens."""
        training = {"microbatch_tokens": 512, "learning_rate": 1e-5} | self.training
        shared: dict[str, Any] = {
            "model": ModelConfig(**({"precision": "fp32"} | self.model)),
            "checkpoint": CheckpointConfig(every_minutes=0.0 if self.checkpoints else 60.0),
            "seed": 0,
        }
        if self.stage == "sft":
            return SftStageConfig(sft=SftConfig(max_steps=2, batch_size=4, training=training), **shared)
        if self.stage == "dpo":
            return DpoStageConfig(dpo=DpoConfig(max_steps=2, batch_size=2, training=training, **self.dpo), **shared)
        if self.stage == "reward_model":
            section = RewardModelConfig(max_steps=2, batch_size=2, num_calibration_samples=4, training=training)
            return RewardModelStageConfig(reward_model=section, sampling=_sampling(16, 4), **shared)
        if self.stage == "evaluation":
            return EvaluationStageConfig(
                model=shared["model"],
                evaluation=EvaluationConfig(num_prompts=8, **self.evaluation),
                rollout=EngineConfig(**self.rollout),
                sampling=_sampling(NEW_TOKENS, 8),
                gate=GateConfig(),
                judge=JUDGE,
                seed=0,
            )
        rollout = RolloutConfig(num_prompts=8, sampling=_sampling(NEW_TOKENS, 8))
        ppo = PpoConfig(
            num_iterations=2,
            minibatch=8,
            rollout=rollout,
            training=training,
            critic=CriticConfig(**self.critic),
            **self.ppo,
        )
        return PpoStageConfig(ppo=ppo, **shared)

    def plan(self) -> StagePlan:
        shape = shape_from({"model_type": "llama", **config_of(self.size)}, {}, self.size)
        job = Job(
            shape=shape,
            reward_shape=shape,
            judge_shape=shape if self.stage == "evaluation" else None,
            numeric=Numeric(bf16=self.model.get("precision") == "bf16", on_gpu=False),
            prompt_tokens=PROMPT_TOKENS,
            text_tokens=MAX_TOKENS,
            checkpoints=self.checkpoints,
        )
        plans: dict[str, Any] = {
            "sft": plan_sft,
            "reward_model": plan_reward_model,
            "ppo": plan_ppo,
            "dpo": plan_dpo,
            "evaluation": plan_evaluation,
        }
        found: StagePlan = plans[self.stage](self.config(), job)
        return found


def _sampling(new_tokens: int, batch_size: int) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, batch_size=batch_size)


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, "num_processes": 2, **more}


BF16: dict[str, Any] = {"precision": "bf16"}
LORA: dict[str, Any] = {"lora": {}}
QLORA: dict[str, Any] = {"lora": {"quantization": "nf4"}}
VLLM: dict[str, Any] = {"engine": "vllm", "vllm": {"kv_cache_gib": 0.5}}
CRITIC_FREE: dict[str, Any] = {"advantage": "reinforce++"}
CASES = (
    *(Case(stage="sft", size=size) for size in ("60M", "150M", "300M")),
    Case(stage="sft", size="60M", label="bf16", model=BF16),
    Case(stage="sft", size="150M", label="bf16", model=BF16),
    Case(stage="sft", size="60M", label="checkpointed activations", training={"gradient_checkpointing": True}),
    Case(stage="sft", size="60M", label="passes of 256 tokens", training={"microbatch_tokens": 256}),
    Case(stage="sft", size="60M", label="frozen", model={"num_frozen_layers": 12}),
    Case(stage="sft", size="60M", label="LoRA", model=LORA),
    Case(stage="sft", size="60M", label="LoRA, bf16", model=LORA | BF16),
    Case(stage="sft", size="150M", label="LoRA", model=LORA),
    Case(stage="sft", size="60M", label="QLoRA", model=QLORA),
    Case(stage="sft", size="150M", label="2 processes", training={"num_processes": 2}),
    Case(stage="sft", size="60M", label="ZeRO-1 x 2", training=_zero(1)),
    Case(stage="sft", size="60M", label="ZeRO-1 x 2, bf16", model=BF16, training=_zero(1)),
    Case(stage="sft", size="60M", label="ZeRO-2 x 2", training=_zero(2)),
    Case(stage="sft", size="60M", label="ZeRO-2 x 2, bf16", model=BF16, training=_zero(2)),
    Case(stage="sft", size="150M", label="ZeRO-2 x 2", training=_zero(2)),
    Case(stage="sft", size="60M", label="ZeRO-3 x 2", training=_zero(3)),
    Case(stage="sft", size="60M", label="ZeRO-3 x 2, bf16", model=BF16, training=_zero(3)),
    Case(stage="sft", size="150M", label="ZeRO-3 x 2", training=_zero(3)),
    Case(stage="sft", size="150M", label="ZeRO-3 x 2, bf16", model=BF16, training=_zero(3)),
    Case(stage="reward_model", size="60M"),
    Case(stage="reward_model", size="150M"),
    Case(stage="reward_model", size="150M", label="LoRA", model=LORA),
    Case(stage="ppo", size="60M"),
    Case(stage="ppo", size="60M", label="bf16", model=BF16),
    Case(stage="ppo", size="60M", label="LoRA", model=LORA),
    Case(
        stage="ppo",
        size="60M",
        label="frozen, critic's head",
        model={"num_frozen_layers": 12},
        critic={"trains": "head"},
    ),
    Case(stage="ppo", size="60M", label="ZeRO-2 x 2, bf16", model=BF16, training=_zero(2)),
    Case(stage="ppo", size="60M", label="ZeRO-3 x 2, bf16", model=BF16, training=_zero(3)),
    Case(stage="ppo", size="60M", label="QLoRA", model=QLORA),
    Case(stage="ppo", size="60M", label="without a critic", ppo=CRITIC_FREE),
    Case(stage="ppo", size="60M", label="without a critic, LoRA", model=LORA, ppo=CRITIC_FREE),
    Case(stage="ppo", size="60M", label="without a critic, entropy bonus", ppo=CRITIC_FREE | {"entropy_coef": 0.01}),
    Case(stage="ppo", size="150M"),
    *(Case(stage="dpo", size=size) for size in ("60M", "150M")),
    Case(stage="dpo", size="60M", label="bf16", model=BF16),
    Case(stage="dpo", size="60M", label="frozen", model={"num_frozen_layers": 12}),
    Case(stage="dpo", size="60M", label="LoRA", model=LORA),
    Case(stage="dpo", size="60M", label="QLoRA", model=QLORA),
    Case(stage="dpo", size="60M", label="ZeRO-2 x 2", training=_zero(2)),
    Case(stage="dpo", size="60M", label="ZeRO-3 x 2, bf16", model=BF16, training=_zero(3)),
    Case(
        stage="dpo",
        size="60M",
        label="passes of the reference of 4,096 tokens",
        dpo={"reference_microbatch_tokens": 4096},
    ),
    Case(stage="evaluation", size="60M"),
    Case(
        stage="evaluation",
        size="60M",
        label="ZeRO-3 x 2, vLLM",
        evaluation={"num_processes": 2, "shard_weights": True},
        rollout=VLLM,
    ),
)
