"""A run whose weights below the adapters are in 4 bits: SFT, reward model and PPO one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.ppo.policy import save_policy
from components.rlhf.config.model import LoraConfig
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm
from components.rlhf.models.nf4 import Nf4Linear
from components.rlhf.models.saving import save_model
from components.rlhf.models.scalar import ScalarModel
from tests.ppo.test_lora import BATCH, logprobs, matrices
from tests.sft.test_trainer import DATA, HELDOUT
from tests.sft.test_trainer import trainer_of as sft_trainer_of
from tests.support.ppo_runs import (
    FP32,
    PROMPTS,
    VALIDATION,
    config_of,
    largest_gap,
    load,
    make_reward_model,
    trainer_of,
    weights,
    without_times,
)
from tests.support.reward_model_runs import PAIRS
from tests.support.reward_model_runs import trainer_of as reward_trainer_of
from tests.support.tiny_model import make_tiny_model
from tests.support.training import checkpoints_every_step

QLORA = LoraConfig(rank=8, alpha=16.0, quantization="nf4")
FROZEN = 1
# Small steps: updates far below the distance of two values in 4 bits.
RATE: dict[str, Any] = {"learning_rate": 3e-4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of SFT, and of a reward model that is trained from it."""
    folder = tmp_path_factory.mktemp("qlora")
    make_tiny_model(folder / "base", seed=4)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    sft = sft_trainer_of(folder / "base", frozen=FROZEN, lora=QLORA, training=RATE)
    sft.train(tokenizer, DATA, HELDOUT, max_tokens=64)
    save_model(sft.actor.lm, tokenizer, folder / "sft", dtype=FP32, weights=sft.weights())
    torch.save(sft.actor(BATCH, SamplingDistribution())[0], folder / "sft.pt")
    reward = reward_trainer_of(folder / "sft", frozen=FROZEN, lora=QLORA, training=RATE)
    reward.train(tokenizer, PAIRS, max_tokens=64)
    reward.model.lm.config.reward_mean, reward.model.lm.config.reward_std = 0.2, 1.5
    save_model(reward.model.lm, tokenizer, folder / "reward", dtype=FP32, weights=reward.weights())
    torch.save(reward.model.scores(BATCH), folder / "reward.pt")
    return folder


def stage(**changes: Any) -> Any:
    return config_of(**({"frozen": FROZEN, "lora": QLORA} | changes))


def saved(path: Path) -> Tensor:
    found: Tensor = torch.load(path)
    return found.detach()


@pytest.mark.parametrize("trains", ["layers", "head"])
def test_ppo_starts_from_exactly_what_the_stages_before_have_trained(run: Path, trains: str) -> None:
    models, _ = load(stage(critic={"trains": trains}), run / "sft", run / "reward")
    ours, reference = logprobs(models)
    assert torch.equal(ours, reference)
    torch.testing.assert_close(reference, saved(run / "sft.pt"), rtol=1e-5, atol=1e-5)
    scores = (saved(run / "reward.pt") - 0.2) / 1.5
    torch.testing.assert_close(models.reward_model.scores(BATCH), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(models.critic.scores(BATCH), scores, rtol=1e-5, atol=1e-5)
    # Also what the artifacts contain for readers that know nothing of 4 bits.
    sft = load_causal_lm(run / "sft", num_frozen_layers=0, dtype=FP32, trainable=False)
    plain = Actor(sft, num_frozen_layers=0, dtype=FP32)(BATCH, SamplingDistribution())[0]
    torch.testing.assert_close(reference, plain, rtol=1e-5, atol=1e-5)
    reward = load_scalar_lm(run / "reward", num_frozen_layers=0, dtype=FP32, trainable=False)
    plain_scores = ScalarModel(reward, num_frozen_layers=0, dtype=FP32, mean=0.2, std=1.5).scores(BATCH)
    torch.testing.assert_close(plain_scores, scores, rtol=1e-5, atol=1e-5)


def test_models_share_backbones_and_frozen_layers_in_4_bits(run: Path) -> None:
    models, rollout = load(stage(), run / "sft", run / "reward")
    assert models.shared_trunk
    policy, scalar = matrices(models.actor), matrices(models.critic)
    assert matrices(models.reference) == policy and matrices(models.reward_model) == scalar
    shared = {p.data_ptr() for p in models.actor.lm.model.layers[0].parameters()}
    assert shared <= policy & scalar
    for model in (models.actor, models.critic):
        assert sum(isinstance(module, Nf4Linear) for module in model.modules()) == 3 * 7
    assert not any(isinstance(module, Nf4Linear) for module in rollout.model.modules())


@pytest.mark.parametrize("trains", ["layers", "head"])
def test_training_changes_the_adapters_and_no_4_bits(run: Path, tmp_path: Path, trains: str) -> None:
    trainer = trainer_of(stage(critic={"trains": trains}, num_epochs=2), run / "sft", run / "reward")
    before = weights(trainer)
    reference = logprobs(trainer.learner.models)[1]
    scores = trainer.learner.models.reward_model.scores(BATCH)
    first, second = trainer.train(PROMPTS, [])
    assert first["actor/first_ratio_error"] == first["kl/sequence"] == second["actor/first_ratio_error"] == 0.0
    assert second["kl/sequence"] != 0.0
    assert max(row["engine_gap/max"] for row in (first, second)) < 1e-4
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved and all(".lora_" in name or name == "critic.lm.score.weight" for name in moved)
    assert any(name.startswith("critic.") and ".lora_" in name for name in moved) == (trains == "layers")
    assert torch.equal(logprobs(trainer.learner.models)[1], reference)
    assert torch.equal(trainer.learner.models.reward_model.scores(BATCH), scores)
    expected = trainer.learner.models.actor.lm(BATCH.input_ids).logits
    save_policy(trainer, trainer.rollout.tokenizer, trainer.weights(), tmp_path / "policy")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(policy(BATCH.input_ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / "policy" / "nf4" / "weights.safetensors")["1.mlp.up_proj.A"].shape[0] == 16  # SFT, PPO


@pytest.mark.parametrize("trains", ["layers", "head"])
def test_resumed_run_equals_an_uninterrupted_one(run: Path, tmp_path: Path, trains: str) -> None:
    config = stage(critic={"trains": trains}, num_iterations=4, num_epochs=2, eval_every=2)
    undisturbed = trainer_of(config, run / "sft", run / "reward")
    expected = undisturbed.train(PROMPTS, VALIDATION)
    dying = trainer_of(
        config, run / "sft", run / "reward", checkpoints=checkpoints_every_step(tmp_path, "ppo"), interrupt_at=3
    )
    with pytest.raises(KeyboardInterrupt):
        dying.train(PROMPTS, VALIDATION)
    files = list(tmp_path.rglob("engine-*.safetensors"))
    names = {name for file in files for name in load_file(file)}
    assert files and all(".lora_" in name or "score" in name or "steps_done" in name for name in names)
    resumed = trainer_of(config, run / "sft", run / "reward", checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    assert without_times(resumed.train(PROMPTS, VALIDATION)) == without_times(expected)
    assert largest_gap(as_floats(weights(resumed)), as_floats(weights(undisturbed))) == 0.0


def as_floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def test_artifacts_without_4_bits_are_quantized_when_ppo_begins(tiny_model: Path, reward_model: Path) -> None:
    """A model that was imported after SFT. The rollout engine gets the quantized weights before the first rollout."""
    trainer = trainer_of(stage(), tiny_model, reward_model)
    history = trainer.train(PROMPTS, [])
    assert history[0]["kl/sequence"] == 0.0
    assert max(row["engine_gap/max"] for row in history) < 1e-4
    assert trainer.rollout.version == 3  # one before the first iteration


def test_foreign_reward_model_keeps_its_own_4_bits(run: Path, tmp_path: Path) -> None:
    other = make_reward_model(make_tiny_model(tmp_path / "other", seed=8), tmp_path / "reward")
    models, _ = load(stage(), run / "sft", other)
    assert not models.shared_trunk
    assert not matrices(models.actor) & matrices(models.critic)
