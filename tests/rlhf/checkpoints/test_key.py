from dataclasses import replace
from typing import Any

import pytest

from components.rlhf.artifacts.manifest import FileEntry, Manifest
from components.rlhf.checkpoints import key as key_module
from components.rlhf.checkpoints.key import checkpoint_key
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.reward_model import RewardModelConfig, RewardModelStageConfig
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig

STAGE = SftStageConfig(model=ModelConfig(), sft=SftConfig(), checkpoint=CheckpointConfig(), seed=0)
BASE = Manifest(kind="base_model", files={"a": FileEntry(sha256="0", size=1)}, created_at="yesterday")
DATA = Manifest(kind="demonstrations", files={"b": FileEntry(sha256="1", size=1)})


@pytest.fixture(autouse=True)
def _one_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_module, "code_revision", lambda: "abc")


def changed(**config: Any) -> SftStageConfig:
    return SftStageConfig(**(dict(STAGE) | config))


def test_key_is_the_stage_and_a_digest() -> None:
    stage, digest = checkpoint_key("sft", STAGE, BASE, DATA).split("/")
    assert stage == "sft"
    assert len(digest) == 16
    assert set(digest) <= set("0123456789abcdef")


def test_key_is_reproducible() -> None:
    again = SftStageConfig.from_json(STAGE.canonical_json())
    assert checkpoint_key("sft", again, BASE, DATA) == checkpoint_key("sft", STAGE, BASE, DATA)


def test_key_ignores_save_interval_and_creation_times() -> None:
    expected = checkpoint_key("sft", STAGE, BASE, DATA)
    often = changed(checkpoint=CheckpointConfig(every_minutes=0.5, keep=9))
    assert checkpoint_key("sft", often, BASE, DATA) == expected
    assert checkpoint_key("sft", STAGE, replace(BASE, created_at="today"), DATA) == expected


def test_key_ignores_the_budget() -> None:
    other = changed(budget=BudgetConfig(limit=5, price_per_hour=1))
    assert checkpoint_key("sft", other, BASE, DATA) == checkpoint_key("sft", STAGE, BASE, DATA)


@pytest.mark.parametrize("training", [{"num_processes": 2}, {"timeout_minutes": 1}])
def test_key_ignores_process_count_and_timeout(training: dict[str, Any]) -> None:
    other = changed(sft=SftConfig(training=TrainingConfig(**training)))
    assert checkpoint_key("sft", other, BASE, DATA) == checkpoint_key("sft", STAGE, BASE, DATA)


def test_key_of_a_reward_model_ignores_the_engine_of_its_calibration() -> None:
    hf = RewardModelStageConfig(
        model=ModelConfig(),
        reward_model=RewardModelConfig(),
        sampling=SamplingConfig(),
        checkpoint=CheckpointConfig(),
        seed=0,
    )
    vllm = hf.model_copy(update={"rollout": EngineConfig(engine="vllm")})
    assert checkpoint_key("reward_model", hf, BASE) == checkpoint_key("reward_model", vllm, BASE)


@pytest.mark.parametrize(
    "config",
    [
        {"seed": 1},
        {"model": ModelConfig(num_frozen_layers=1)},
        {"sft": SftConfig(max_steps=5)},
        {"sft": SftConfig(training=TrainingConfig(learning_rate=2e-5))},
        {"sft": SftConfig(training=TrainingConfig(engine="deepspeed"))},
    ],
    ids=["seed", "frozen layers", "steps", "learning rate", "engine"],
)
def test_key_changes_with_every_other_setting(config: dict[str, Any]) -> None:
    assert checkpoint_key("sft", changed(**config), BASE, DATA) != checkpoint_key("sft", STAGE, BASE, DATA)


def test_key_changes_with_the_inputs() -> None:
    other = replace(BASE, files={"a": FileEntry(sha256="2", size=1)})
    keys = {
        checkpoint_key("sft", STAGE, *inputs)
        for inputs in ((BASE, DATA), (other, DATA), (DATA, BASE), (BASE,), (BASE, DATA, DATA))
    }
    assert len(keys) == 5


def test_key_changes_with_the_code_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint_key("sft", STAGE, BASE, DATA)
    monkeypatch.setattr(key_module, "code_revision", lambda: "abc+dirty")
    assert checkpoint_key("sft", STAGE, BASE, DATA) != before


def test_key_changes_with_the_format_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint_key("sft", STAGE, BASE, DATA)
    monkeypatch.setattr(key_module, "STATE_FORMAT", key_module.STATE_FORMAT + 1)
    assert checkpoint_key("sft", STAGE, BASE, DATA) != before
