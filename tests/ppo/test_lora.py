"""PPO with adapters: shared backbones, and the same guarantees as without adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from components.ppo.experience import Models
from components.ppo.models import load_models
from components.ppo.policy import save_policy
from components.rlhf.config.model import LoraConfig
from components.rlhf.data.batching import collate
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.text.errors import InputError
from tests.support.ppo_runs import (
    FP32,
    PROMPTS,
    VALIDATION,
    config_of,
    largest_gap,
    load,
    make_reward_model,
    share_of_low_ids,
    trainer_of,
    weights,
    without_times,
)
from tests.support.tiny_model import make_tiny_model
from tests.support.training import checkpoints_every_step

LORA = LoraConfig(rank=8, alpha=16.0)
BF16 = torch.bfloat16
BATCH = collate([[5, 6, 7], [8]], [[3, 4, 0], [1, 2, 9, 10]])


def matrices(*modules: nn.Module) -> set[int]:
    """Addresses of every weight except adapters and heads."""
    return {
        p.data_ptr()
        for module in modules
        for name, p in module.named_parameters()
        if ".lora_" not in name and "score" not in name
    }


def stir(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def logprobs(models: Models) -> list[Tensor]:
    return [actor(BATCH, SamplingDistribution())[0] for actor in (models.actor, models.reference)]


@pytest.mark.parametrize("trains", ["layers", "head"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_models_hold_each_backbone_once(tiny_model: Path, reward_model: Path, frozen: int, trains: str) -> None:
    models, rollout = load(config_of(frozen=frozen, lora=LORA, critic={"trains": trains}), tiny_model, reward_model)
    policy, scalar = matrices(models.actor), matrices(models.critic)
    assert matrices(models.reference) == policy
    assert matrices(models.reward_model) == scalar
    assert models.shared_trunk == bool(frozen)
    # Without frozen layers three backbones with 29 matrices; frozen are the embeddings and nine matrices a layer.
    assert len(policy) == len(scalar) == len(matrices(rollout.model)) == 29
    trunk = 1 + 9 * frozen if frozen else 0
    assert len(policy | scalar | matrices(rollout.model)) == 3 * 29 - 2 * trunk


def test_foreign_reward_model_keeps_its_own_frozen_layers(tiny_model: Path, tmp_path: Path) -> None:
    other = make_reward_model(make_tiny_model(tmp_path / "other", seed=8), tmp_path / "reward")
    models, rollout = load(config_of(frozen=2, lora=LORA), tiny_model, other)
    assert not models.shared_trunk
    assert not matrices(models.actor) & matrices(models.critic)
    assert matrices(models.reward_model) == matrices(models.critic)
    assert len(matrices(models.actor) & matrices(rollout.model)) == 19


def test_only_adapters_and_the_critic_head_are_trained(tiny_model: Path, reward_model: Path) -> None:
    for trains in ("layers", "head"):
        stage = config_of(frozen=1, lora=LORA, critic={"trains": trains})
        models, rollout = load(stage, tiny_model, reward_model)
        named = {
            kind: {name for name, p in module.named_parameters() if p.requires_grad and ".lora_" not in name}
            for kind, module in (("actor", models.actor), ("critic", models.critic), ("rollout", rollout.model))
        }
        assert named == {"actor": set(), "critic": {"lm.score.weight"}, "rollout": set()}
        adapted = [name for name, p in models.critic.named_parameters() if p.requires_grad and ".lora_" in name]
        assert len(adapted) == {"layers": 2 * 2 * 7, "head": 0}[trains]
        assert not models.reward_model.lm.score.weight.requires_grad


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("frozen", [0, 2])
def test_reference_and_reward_model_do_not_change_during_training(
    tiny_model: Path, reward_model: Path, frozen: int, dtype: torch.dtype
) -> None:
    stage = config_of(frozen=frozen, lora=LORA)
    models, _ = load_models(stage, tiny_model, reward_model, dtype=dtype, prompts=[])
    ours, theirs = logprobs(models)
    assert torch.equal(ours, theirs)  # the KL is exactly 0
    scores = models.reward_model.scores(BATCH)
    # Up to rounding: the head is a copy with another memory alignment.
    torch.testing.assert_close(models.critic.scores(BATCH), scores, rtol=1e-6, atol=1e-6)
    for module in (models.actor, models.critic):
        stir(module)
    moved, still = logprobs(models)
    assert not torch.equal(moved, ours)
    assert torch.equal(still, ours)
    assert torch.equal(models.reward_model.scores(BATCH), scores)
    assert not torch.allclose(models.critic.scores(BATCH), scores)


OPTIONS: dict[str, Any] = {"num_iterations": 4, "num_epochs": 2, "eval_every": 2}


@pytest.mark.parametrize("frozen", [0, 2])
def test_first_ratio_is_1_and_first_kl_is_0_with_adapters(tiny_model: Path, reward_model: Path, frozen: int) -> None:
    stage = config_of(frozen=frozen, lora=LORA, num_epochs=2, training={"microbatch_tokens": 30})
    trainer = trainer_of(stage, tiny_model, reward_model)
    base = {name: weight for name, weight in weights(trainer).items() if ".lora_" not in name and "score" not in name}
    first, second = trainer.train(PROMPTS, [])
    assert first["actor/first_ratio_error"] == first["kl/sequence"] == first["kl/token"] == 0.0
    assert second["actor/first_ratio_error"] == 0.0
    assert second["kl/sequence"] != 0.0
    after = weights(trainer)
    assert all(torch.equal(after[name], weight) for name, weight in base.items())


@pytest.mark.parametrize("frozen", [0, 2])
def test_rollout_samples_from_the_merged_weights(tiny_model: Path, reward_model: Path, frozen: int) -> None:
    trainer = trainer_of(config_of(frozen=frozen, lora=LORA), tiny_model, reward_model)
    before = {name: p.clone() for name, p in trainer.rollout.model.named_parameters()}
    history = trainer.train(PROMPTS, [])
    moved = {name for name, p in trainer.rollout.model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 7 * (3 - frozen)
    assert history[1]["kl/sequence"] != 0.0
    assert max(row["engine_gap/max"] for row in history) < 1e-4


def test_training_adapters_raises_the_score(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(
        lora=LORA,
        num_iterations=12,
        num_epochs=2,
        minibatch=64,
        kl_coef=0.0,
        rollout={"num_prompts": 128},
        sampling={"batch_size": 128, "max_new_tokens": 4, "min_new_tokens": 4},
        training={"learning_rate": 1e-2, "schedule": "linear", "min_learning_rate_fraction": 0.0},
        critic={"learning_rate": 1e-2},
    )
    trainer = trainer_of(stage, tiny_model, reward_model, reward=lambda p, r: 3 * share_of_low_ids(p, r))
    history = trainer.train(PROMPTS, [])
    assert sum(row["score/mean"] for row in history[-3:]) / 3 > history[0]["score/mean"] + 0.3
    assert history[-1]["value/explained_variance"] > history[0]["value/explained_variance"]


@pytest.mark.parametrize(("frozen", "trains"), [(0, "layers"), (2, "layers"), (1, "head")])
def test_resumed_adapter_run_equals_an_uninterrupted_one(
    tiny_model: Path, reward_model: Path, tmp_path: Path, frozen: int, trains: str
) -> None:
    stage = config_of(frozen=frozen, lora=LORA, critic={"trains": trains}, **OPTIONS)
    undisturbed = trainer_of(stage, tiny_model, reward_model)
    expected = undisturbed.train(PROMPTS, VALIDATION)
    dying = trainer_of(
        stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"), interrupt_at=3
    )
    with pytest.raises(KeyboardInterrupt):
        dying.train(PROMPTS, VALIDATION)
    resumed = trainer_of(stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    assert without_times(resumed.train(PROMPTS, VALIDATION)) == without_times(expected)
    assert largest_gap(weights(resumed), weights(undisturbed)) == 0.0


def test_checkpoint_without_adapters_is_refused(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    trainer_of(config_of(), tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo")).train(
        PROMPTS, []
    )
    other = trainer_of(
        config_of(lora=LORA), tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo")
    )
    with pytest.raises(InputError, match="holds a different set of trained weights"):
        other.train(PROMPTS, [])


def test_saved_policy_is_a_merged_model_with_an_adapter_folder(
    tiny_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(config_of(lora=LORA, training={"learning_rate": 1e-2}), tiny_model, reward_model)
    trainer.train(PROMPTS, [])
    lm = trainer.learner.models.actor.lm
    logits = lm(BATCH.input_ids).logits
    save_policy(trainer, trainer.rollout.tokenizer, trainer.weights(), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert (base(BATCH.input_ids).logits - logits).abs().max() > 1e-2
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for found in (AutoModelForCausalLM.from_pretrained(tmp_path), adapted):
        torch.testing.assert_close(found.eval()(BATCH.input_ids).logits, logits, rtol=1e-4, atol=1e-4)
