"""A reference that is reset to the actor, or follows it as a moving average."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from components.ppo.models import load_models
from components.ppo.reference import MovingReference
from components.rlhf.config.model import LoraConfig, ModelConfig
from components.rlhf.config.ppo import PpoConfig, PpoStageConfig, ReferenceConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.torch import TorchEngine
from tests.support.ppo_runs import PROMPTS, config_of, largest_gap, share_of_low_ids, trainer_of, weights, without_times
from tests.support.training import checkpoints_every_step


def test_a_reset_reference_is_the_actor(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(num_iterations=4, frozen=1, reference={"update_every": 2})
    trainer = trainer_of(stage, tiny_model, reward_model, reward=share_of_low_ids)
    history = trainer.train(PROMPTS, [])
    assert [row["kl/sequence"] == 0.0 for row in history] == [True, False, True, False]
    pairs = zip(trainer.learner.models.reference.parameters(), trainer.learner.models.actor.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_average_by_hand(tiny_model: Path, reward_model: Path, dtype: torch.dtype) -> None:
    stage = config_of(frozen=1)
    models, _ = load_models(stage, tiny_model, reward_model, dtype=dtype, prompts=[])
    engine = TorchEngine(models.actor, stage.ppo.training, num_steps=1)
    moving = MovingReference(models.reference, engine, ReferenceConfig(update_every=3, decay=0.75), rank=0)
    expected = {name: p.detach().double() for name, p in models.reference.named_parameters() if name in moving.weights}
    frozen = {name: p.detach().clone() for name, p in models.reference.named_parameters() if name not in moving.weights}
    assert expected and frozen
    trained = dict(models.actor.named_parameters())
    for iteration in range(1, 10):
        with torch.no_grad():
            for name in expected:
                trained[name] += 1e-4  # in bf16 a step of the average would be rounded away
        if iteration % 3 == 0:
            for name, old in expected.items():
                expected[name] = 0.75 * old + 0.25 * trained[name].double()
        moving.follow(iteration)
        for name, p in models.reference.named_parameters():
            if name in frozen:
                assert torch.equal(p, frozen[name])
            else:
                assert torch.allclose(
                    p.double(), expected[name], atol=1e-6, rtol=0.004 if p.dtype == torch.bfloat16 else 0
                )
                assert torch.allclose(moving.averages[name].double(), expected[name], atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_resumed_run_has_the_moved_reference(
    tiny_model: Path, reward_model: Path, tmp_path: Path, decay: float
) -> None:
    stage = config_of(num_iterations=4, reference={"update_every": 2, "decay": decay})
    whole = trainer_of(stage, tiny_model, reward_model, reward=share_of_low_ids)
    history = whole.train(PROMPTS, [])
    options: dict[str, Any] = {"reward": share_of_low_ids}
    first = trainer_of(
        stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"), interrupt_at=4, **options
    )
    with pytest.raises(KeyboardInterrupt):
        first.train(PROMPTS, [])
    resumed = trainer_of(
        stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"), **options
    )
    assert without_times(resumed.train(PROMPTS, [])) == without_times(history)
    assert largest_gap(weights(resumed), weights(whole)) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": {"decay": 0.5}}, "reference.update_every is 0, so the reference never moves"),
        ({"eval_every": 5}, "keep compares policies by their KL to the SFT model.*set keep to last"),
        ({"eval_every": 5, "keep": "last", "patience": 2}, "set patience to 0"),
        ({"guard": {"action": "stop"}}, "set guard.action to off"),
    ],
)
def test_what_compares_with_the_sft_model_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PpoConfig(**{"reference": {"update_every": 5}} | settings)


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ({"lora": LoraConfig()}, {}, "with model.lora is the actor without its adapters"),
        ({}, {"engine": "deepspeed", "zero_stage": 3}, "which zero_stage 3 shards"),
    ],
)
def test_a_reference_without_weights_of_its_own_is_refused(
    model: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    ppo = PpoConfig(reference=ReferenceConfig(update_every=1), training=training)
    with pytest.raises(ValidationError, match=message):
        PpoStageConfig(model=ModelConfig(**model), ppo=ppo, checkpoint=CheckpointConfig(), seed=0)
