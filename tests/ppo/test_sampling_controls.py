"""PPO on responses that are sampled with controls: both sides of the ratio are of the distribution that was sampled from."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.rlhf.rollout.test_controls import every_control
from tests.support.ppo_runs import PROMPTS, VALIDATION, Row, config_of, make_reward_model, share_of_low_ids, trainer_of
from tests.support.tiny_model import make_tiny_model

SAMPLING = {"max_new_tokens": 6, "batch_size": 16}


def history_of(sft: Path, reward_model: Path, controls: dict[str, Any], **ppo: Any) -> list[Row]:
    rollout = {"num_prompts": 16} | ppo.pop("rollout", {})
    stage = config_of(minibatch=8, num_epochs=2, eval_every=1, rollout=rollout, sampling=SAMPLING | controls, **ppo)
    trainer = trainer_of(stage, sft, reward_model)
    try:
        return trainer.train(PROMPTS, VALIDATION)
    finally:
        trainer.rollout.close()


def check(history: list[Row]) -> None:
    first, second = history
    assert first["actor/first_ratio_error"] == second["actor/first_ratio_error"] == 0.0
    assert first["kl/sequence"] == 0.0 != second["kl/sequence"]
    assert max(row["engine_gap/max"] for row in history) < 1e-4
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert first["actor/grad_norm"] > 0


@every_control
@pytest.mark.parametrize("frozen", [0, 2])
def test_first_ratio_is_1_and_the_gap_of_the_engine_is_0(
    tiny_model: Path, reward_model: Path, controls: dict[str, Any], frozen: int
) -> None:
    check(history_of(tiny_model, reward_model, controls, frozen=frozen))


def test_entropy_is_that_of_the_truncated_distribution(tiny_model: Path, reward_model: Path) -> None:
    entropies = [
        history_of(tiny_model, reward_model, controls, num_iterations=1)[0]["entropy"]
        for controls in ({}, {"top_p": 0.7}, {"top_k": 5}, {"top_k": 1})
    ]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[2] <= math.log(5)
    assert entropies[3] == 0.0


def test_stop_strings_end_responses_like_stop_tokens(tiny_model: Path, reward_model: Path) -> None:
    (plain,) = history_of(tiny_model, reward_model, {}, num_iterations=1)
    (row,) = history_of(tiny_model, reward_model, {"stop": ("a", "e", "i", "o", "u", " ", "s", "t")}, num_iterations=1)
    assert row["response/eos_rate"] > plain["response/eos_rate"]
    assert row["response/length"] < plain["response/length"]
    assert row["actor/first_ratio_error"] == 0.0


def test_actor_learns_from_truncated_samples(tiny_model: Path, reward_model: Path) -> None:
    controls = {"top_p": 0.8, "repetition_penalty": 1.2}
    stage = config_of(
        num_iterations=8,
        num_epochs=2,
        minibatch=64,
        training={"learning_rate": 2e-3},
        critic={"learning_rate": 1e-2},
        normalize_reward=False,
        kl_coef=0.01,
        rollout={"num_prompts": 128},
        sampling={"batch_size": 128, "max_new_tokens": 4, "min_new_tokens": 4} | controls,
    )
    trainer = trainer_of(stage, tiny_model, reward_model, reward=lambda p, r: 3 * share_of_low_ids(p, r))
    scores = [row["score/mean"] for row in trainer.train(PROMPTS, [])]
    assert sum(scores[-3:]) / 3 > scores[0] + 0.3


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor with a head size that vLLM supports on a CPU, and its reward model."""
    folder = tmp_path_factory.mktemp("wide")
    make_reward_model(make_tiny_model(folder / "sft", seed=0, hidden_size=128), folder / "reward")
    return folder


@pytest.mark.vllm
@every_control
def test_gap_to_vllm_is_0(wide: Path, controls: dict[str, Any]) -> None:
    check(history_of(wide / "sft", wide / "reward", controls, rollout={"engine": "vllm"}))
