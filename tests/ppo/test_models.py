import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.ppo.models import copy_with_own_head, load_models
from components.ppo.policy import save_policy
from components.rlhf.config.model import LoraConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Conversation, Message, Prompt, ValidationSample
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.saving import save_model
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.text.errors import InputError
from tests.support.ppo_runs import FP32, PROMPTS, config_of, load, make_reward_model, trainer_of
from tests.support.tiny_model import make_tiny_model

BATCH = collate([[5, 6, 7], [8]], [[3, 4, 0], [1, 2, 9, 10]])


def parameters_of(*modules: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


@pytest.mark.parametrize("trains", ["layers", "head"])
def test_all_four_models_hold_the_same_frozen_layers(tiny_model: Path, reward_model: Path, trains: str) -> None:
    models, rollout = load(config_of(frozen=2, critic={"trains": trains}), tiny_model, reward_model)
    assert models.shared_trunk
    assert rollout.model is models.actor.lm
    lms = [models.reference.lm, models.critic.lm, models.reward_model.lm]
    for lm in lms:
        assert lm.get_input_embeddings() is models.actor.lm.get_input_embeddings()
        assert all(lm.model.layers[i] is models.actor.lm.model.layers[i] for i in range(2))
        assert lm.model.layers[2] is not models.actor.lm.model.layers[2]
    assert (models.critic.lm.model is models.reward_model.lm.model) == (trains == "head")
    apart = load(config_of(frozen=0, critic={"trains": trains}), tiny_model, reward_model)
    trunk = parameters_of(*models.actor.lm.model.layers[:2], models.actor.lm.get_input_embeddings())
    copies = 3 if trains == "layers" else 2
    assert _count(*apart) - _count(models, rollout) == copies * trunk


def test_frozen_layers_are_shared_in_bf16(tiny_model: Path, reward_model: Path) -> None:
    models, _ = load_models(config_of(frozen=2), tiny_model, reward_model, dtype=torch.bfloat16, prompts=[])
    assert models.shared_trunk
    assert models.actor.lm.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert models.actor.lm.model.layers[2].mlp.up_proj.weight.dtype == torch.float32


def test_reward_model_with_other_weights_keeps_its_own_layers(tiny_model: Path, tmp_path: Path) -> None:
    other = make_reward_model(make_tiny_model(tmp_path / "other", seed=8), tmp_path / "reward")
    models, rollout = load(config_of(frozen=2), tiny_model, other)
    assert not models.shared_trunk
    first = models.actor.lm.model.layers[0]
    assert models.reward_model.lm.model.layers[0] is not first
    assert models.critic.lm.model.layers[0] is not first
    assert models.reference.lm.model.layers[0] is first  # both start from the SFT model
    assert rollout.model.model.layers[0] is first
    fresh = load_scalar_lm(other, num_frozen_layers=0, dtype=FP32)
    expected = ScalarModel(fresh, num_frozen_layers=0, dtype=FP32, mean=0.2, std=1.5).scores(BATCH)
    assert torch.equal(models.reward_model.scores(BATCH), expected)


def test_reward_model_of_another_depth_keeps_its_own_layers(tiny_model: Path, tmp_path: Path) -> None:
    deeper = make_tiny_model(tmp_path / "deeper", seed=8, num_layers=4)
    models, _ = load(config_of(frozen=1), tiny_model, make_reward_model(deeper, tmp_path / "reward"))
    assert not models.shared_trunk


def _count(models: Any, rollout: Any) -> int:
    return parameters_of(models.actor, models.reference, models.critic, models.reward_model, rollout.model)


@pytest.mark.parametrize("frozen", [0, 2])
def test_only_actor_and_critic_are_trained(tiny_model: Path, reward_model: Path, frozen: int) -> None:
    models, rollout = load(config_of(frozen=frozen), tiny_model, reward_model)
    assert any(p.requires_grad for p in models.actor.parameters())
    assert any(p.requires_grad for p in models.critic.parameters())
    assert rollout.model is models.actor.lm
    for module in (models.reference, models.reward_model):
        assert not any(p.requires_grad for p in module.parameters())


def test_reference_holds_its_matrices_in_bf16(tiny_model: Path, reward_model: Path) -> None:
    """The same numbers as from fp32 (tests/ppo/test_reference.py), from half the memory."""
    models, _ = load_models(config_of(), tiny_model, reward_model, dtype=torch.bfloat16, prompts=[])
    dtypes = {name: p.dtype for name, p in models.reference.lm.named_parameters()}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert dtypes["model.embed_tokens.weight"] == dtypes["model.norm.weight"] == FP32
    assert {p.dtype for p in models.actor.parameters()} == {FP32}


def test_reference_starts_with_the_actors_weights(tiny_model: Path, reward_model: Path) -> None:
    models, _ = load(config_of(), tiny_model, reward_model)
    pairs = zip(models.reference.lm.parameters(), models.actor.lm.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"training": {"engine": "deepspeed"}}, FP32),
        ({"training": {"gradient_checkpointing": True}}, FP32),
        ({"lora": LoraConfig()}, FP32),
    ],
    ids=["bf16", "deepspeed", "gradient checkpointing", "lora"],
)
def test_rollout_has_a_copy_where_the_actors_weights_cannot_be_sampled_from(
    changes: dict[str, Any], dtype: torch.dtype, tiny_model: Path, reward_model: Path
) -> None:
    models, rollout = load_models(config_of(**changes), tiny_model, reward_model, dtype=dtype, prompts=[])
    ours = {p.data_ptr() for p in models.actor.lm.parameters()}
    assert not ours & {p.data_ptr() for p in rollout.model.parameters()}
    theirs = {
        name.replace(".base_layer", ""): p for name, p in models.actor.lm.named_parameters() if "lora_" not in name
    }
    assert all(torch.equal(p, theirs[name].to(dtype)) for name, p in rollout.model.named_parameters())


def test_rollout_follows_the_actor_without_a_copy(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(), tiny_model, reward_model)
    version = trainer.rollout.version
    before = trainer.rollout.prompt_logprobs([5, 6, 7])
    trainer.train(PROMPTS, [])  # every sync is checked against the actor
    assert trainer.rollout.version == version + 2
    assert not torch.equal(trainer.rollout.prompt_logprobs([5, 6, 7]), before)


def test_critic_starts_as_the_reward_model(tiny_model: Path, reward_model: Path) -> None:
    """Same weights and same scale: the value of a whole text is its score."""
    for trains in ("layers", "head"):
        models, _ = load(config_of(critic={"trains": trains}), tiny_model, reward_model)
        # Up to rounding: matrix products depend on memory alignment on some CPUs.
        torch.testing.assert_close(models.critic.scores(BATCH), models.reward_model.scores(BATCH), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 2])
def test_critic_head_is_separate_from_the_reward_models_head(tiny_model: Path, reward_model: Path, frozen: int) -> None:
    models, _ = load(config_of(frozen=frozen, critic={"trains": "head"}), tiny_model, reward_model)
    assert {n for n, p in models.critic.named_parameters() if p.requires_grad} == {"lm.score.weight"}
    before = models.reward_model.scores(BATCH)
    models.critic(BATCH).sum().backward()
    with torch.no_grad():
        models.critic.lm.score.weight -= models.critic.lm.score.weight.grad
    assert torch.equal(models.reward_model.scores(BATCH), before)
    assert not torch.equal(models.critic.scores(BATCH), before)


def test_copy_with_own_head_shares_everything_but_the_head(reward_model: Path) -> None:
    lm = load_scalar_lm(reward_model, num_frozen_layers=0, dtype=torch.bfloat16, trainable=False)
    twin = copy_with_own_head(lm)
    assert twin.model is lm.model
    assert twin.score is not lm.score
    assert torch.equal(twin.score.weight, lm.score.weight.float())
    assert twin.score.weight.dtype == FP32
    assert twin.score.weight.requires_grad
    assert not lm.score.weight.requires_grad
    assert lm.score.weight.dtype == torch.bfloat16


def test_scores_are_normalized_by_the_artifacts_mean_and_std(tiny_model: Path, reward_model: Path) -> None:
    models, _ = load(config_of(), tiny_model, reward_model)
    assert [(m.mean, m.std) for m in (models.reward_model, models.critic)] == [(0.2, 1.5)] * 2


def test_scores_are_raw_when_normalization_is_off(tiny_model: Path, reward_model: Path) -> None:
    models, _ = load(config_of(normalize_reward=False), tiny_model, reward_model)
    assert [(m.mean, m.std) for m in (models.reward_model, models.critic)] == [(0.0, 1.0)] * 2


def test_reward_model_without_mean_and_std_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    lm = load_scalar_lm(tiny_model, num_frozen_layers=0, dtype=FP32, seed=0)
    save_model(lm, AutoTokenizer.from_pretrained(tiny_model), tmp_path, dtype=FP32)
    with pytest.raises(InputError, match="lacks reward_mean and reward_std"):
        load(config_of(), tiny_model, tmp_path)
    load(config_of(normalize_reward=False), tiny_model, tmp_path)


def test_sft_model_is_refused_as_a_reward_model(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"lacks the weights score\.weight"):
        load(config_of(normalize_reward=False), tiny_model, tiny_model)


def test_saved_policy_loads_and_holds_the_training_history(
    tiny_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(config_of(), tiny_model, reward_model)
    history = [{"iteration": 1.0, "score/mean": 0.1 + 0.2}, {"iteration": 2.0, "score/mean": -1e-9}]
    chat = Conversation(messages=(Message(role="user", content="It"),))
    samples = [
        ValidationSample(
            iteration=1,
            num_rollouts=8,
            prompt=prompt,
            prompt_ids=[5],
            response_ids=[3, 4],
            response="is",
            truncated=True,
            score=0.5,
            kl=-0.1,
        )
        for prompt in (Prompt(prompt="It", id="validation-0"), Prompt(prompt="<user>It", conversation=chat))
    ]
    trainer.history, trainer.validation = history, samples
    save_policy(trainer, trainer.rollout.tokenizer, trainer.weights(), tmp_path)
    assert load_records(tmp_path, "validation", ValidationSample) == samples
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(BATCH.input_ids).logits, trainer.learner.models.actor.lm(BATCH.input_ids).logits)
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history


def test_rollout_stops_at_the_models_stop_ids(tiny_model: Path, reward_model: Path) -> None:
    _, rollout = load(config_of(), tiny_model, reward_model)
    assert rollout.stop_ids == (0,)
