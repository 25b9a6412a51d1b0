"""Before the first update the policy is the reference, bit for bit, with every engine; and no engine rounds RoPE's frequencies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from components.ppo.experience import Learner, Models, make_experience
from components.ppo.models import load_models
from components.rlhf.config.model import LoraConfig
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.engine.factory import create_engine
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.rollout.hf import HfRolloutEngine
from tests.support.ppo_runs import completion, config_of, make_reward_model, rewards_of
from tests.support.tiny_model import make_tiny_model

FP32, BF16 = torch.float32, torch.bfloat16
COMPLETIONS = [completion([5, 6, 7], [8, 9, 10, 11]), completion([12], [13, 0]), completion([15, 16], [17] * 9)]
LATE = collate([[(7 * n) % 250 + 1 for n in range(1500)]], [[(11 * n) % 250 + 1 for n in range(40)]])
DEEPSPEED = [
    pytest.param({"engine": "deepspeed", "zero_stage": stage}, id=f"zero{stage}", marks=pytest.mark.deepspeed)
    for stage in (1, 2, 3)
]
ENGINES = [pytest.param({"engine": "torch"}, id="torch"), *DEEPSPEED]
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "frozen": {"frozen": 1}, "adapters": {"lora": LoraConfig(rank=4)}}
COMBINATIONS = [
    pytest.param(engine.values[0], variant, id=f"{engine.id}-{variant}", marks=engine.marks)
    for engine in ENGINES
    for variant in VARIANTS
    if engine.id != "zero3" or variant == "plain"  # ZeRO-3 shards the weights that models would share
]


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that is large enough for ZeRO-3 to shard, and its reward model."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_model(folder / "sft", seed=0, num_layers=2, hidden_size=128, tied=request.param == "tied")
    make_reward_model(folder / "sft", folder / "reward")
    return folder


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    """DeepSpeed creates a process group of one process, which later tests must not find."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def load_with_engines(
    folder: Path, training: dict[str, Any], dtype: torch.dtype, *, frozen: int = 0, lora: LoraConfig | None = None
) -> tuple[PpoStageConfig, Models, HfRolloutEngine]:
    """The models of PPO as the trainer has them before its first iteration."""
    config = config_of(minibatch=1, frozen=frozen, lora=lora, training=training)
    models, rollout = load_models(config, folder / "sft", folder / "reward", dtype=dtype, prompts=[])
    for module in (models.actor, models.critic):
        create_engine(module, config.ppo.training, num_steps=4, group=SINGLE_PROCESS, dtype=dtype)
    return config, models, rollout


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("training", "variant"), COMBINATIONS)
def test_kl_is_exactly_0_before_the_first_update(
    folder: Path, training: dict[str, Any], variant: str, dtype: torch.dtype
) -> None:
    config, models, _ = load_with_engines(folder, training, dtype, **VARIANTS[variant])
    distribution = SamplingDistribution(temperature=0.7, min_new_tokens=1, stop_ids=(0,))
    learner = Learner(models=models, rewards=rewards_of(models), config=config.ppo, distribution=distribution)
    experience = make_experience(learner, COMPLETIONS, kl_coef=0.1)
    assert torch.equal(experience.old_logprobs, experience.ref_logprobs)
    assert torch.equal(experience.kl, torch.zeros(3, 9))
    assert (experience.old_logprobs[experience.batch.response_mask] < -0.01).all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", ENGINES)
def test_rope_frequencies_stay_in_fp32(folder: Path, training: dict[str, Any], dtype: torch.dtype) -> None:
    _, models, rollout = load_with_engines(folder, training, dtype)
    expected = 10_000.0 ** (-torch.arange(0, 32, 2) / 32)  # heads of 32
    for module in (models.actor, models.reference, models.critic, models.reward_model, rollout.model):
        frequencies = [buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")]
        assert frequencies
        for found in frequencies:
            assert found.dtype == FP32
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", ENGINES)
def test_logprobs_in_bf16_are_exact_to_rounding_at_late_positions(folder: Path, training: dict[str, Any]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder / "sft").eval()
    expected = logprobs_of(Actor(plain, num_frozen_layers=0, dtype=FP32), LATE)
    _, models, _ = load_with_engines(folder, training, BF16)
    for actor in (models.actor, models.reference):
        gap = (logprobs_of(actor, LATE) - expected).abs().mean()
        for module in actor.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq.to(BF16).float()
        with_rounded_rope = (logprobs_of(actor, LATE) - expected).abs().mean()
        assert gap < 0.1 < 0.3 < with_rounded_rope


@torch.no_grad()
def logprobs_of(actor: Actor, batch: TokenBatch) -> torch.Tensor:
    return actor(batch, SamplingDistribution())[0]
