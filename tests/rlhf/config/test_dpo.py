import pytest
from pydantic import ValidationError

from components.rlhf.config.dpo import USED_BY, DpoConfig, DpoStageConfig, check_dpo
from components.rlhf.config.model import LoraConfig, ModelConfig, TrainingConfig
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.config.storage import CheckpointConfig

LOSSES = ("dpo", "ipo", "cdpo", "robust", "simpo", "kto")
VALUES = {
    "label_smoothing": 0.2,
    "simpo_gamma": 0.5,
    "desirable_weight": 1.5,
    "undesirable_weight": 2.0,
    "reference_microbatch_tokens": 512,
}


@pytest.mark.parametrize("name", USED_BY)
@pytest.mark.parametrize("loss", LOSSES)
def test_settings_that_the_loss_would_ignore_are_refused(loss: str, name: str) -> None:
    settings = {"label_smoothing": 0.1} if loss in ("cdpo", "robust") else {}
    if loss in USED_BY[name]:
        assert getattr(DpoConfig(loss=loss, **(settings | {name: VALUES[name]})), name) == VALUES[name]
        return
    with pytest.raises(ValidationError, match=f"{name} is set, but loss {loss} (does not use it|has no reference)"):
        DpoConfig(loss=loss, **(settings | {name: VALUES[name]}))


@pytest.mark.parametrize("loss", ["cdpo", "robust"])
def test_losses_for_noisy_labels_need_a_noise(loss: str) -> None:
    with pytest.raises(ValidationError, match="with label_smoothing 0 is dpo"):
        DpoConfig(loss=loss)


def test_reference_free_loss_with_a_setting_of_the_reference_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match="reference_microbatch_tokens is set, but loss simpo has no reference"):
        DpoConfig(loss="simpo", reference_microbatch_tokens=4096)


def test_every_setting_of_a_loss_is_checked() -> None:
    shared = {"loss", "beta", "num_epochs", "max_steps", "batch_size", "training"}
    assert DpoConfig.model_fields.keys() == shared | USED_BY.keys()
    assert {loss for losses in USED_BY.values() for loss in losses} == set(LOSSES)


@pytest.mark.parametrize(("settings", "strength"), [({}, 0.1), ({"loss": "simpo"}, 2.0), ({"beta": 0.3}, 0.3)])
def test_beta_has_the_default_of_the_loss(settings: dict[str, object], strength: float) -> None:
    assert DpoConfig.model_validate(settings).strength == strength


@pytest.mark.parametrize(
    ("loss", "data", "message"),
    [
        ("dpo", {}, "data.preferences is missing, and dpo.loss dpo learns from pairs"),
        ("kto", {}, "data.preferences is missing, and dpo.loss kto learns from rated or labeled answers"),
        (
            "kto",
            {"preferences": {"path": "p"}},
            "data.desirable_rating, which labels them by their ratings, is not set",
        ),
        ("kto", {"preferences": {"path": "p"}, "desirable_rating": 0.5}, None),
        ("dpo", {"preferences": {"path": "p"}}, None),
    ],
)
def test_losses_without_their_data_are_refused(loss: str, data: dict[str, object], message: str | None) -> None:
    config = DataConfig.model_validate({"prompts": {"path": "q"}} | data)
    if message is None:
        check_dpo(DpoConfig(loss=loss), config)
        return
    with pytest.raises(ValueError, match=message):
        check_dpo(DpoConfig(loss=loss), config)


@pytest.mark.parametrize("model", [{"num_frozen_layers": 1}, {"lora": LoraConfig()}])
def test_zero_3_with_shared_weights_is_refused(model: dict[str, object]) -> None:
    training = TrainingConfig(engine="deepspeed", zero_stage=3)
    with pytest.raises(ValidationError, match="zero_stage 3 shards the weights"):
        DpoStageConfig(
            model=ModelConfig.model_validate(model),
            dpo=DpoConfig(training=training),
            checkpoint=CheckpointConfig(),
            seed=0,
        )
