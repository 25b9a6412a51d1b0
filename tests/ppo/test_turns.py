"""Runs of PPO whose responses have several turns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.ppo.trainer import PpoTrainer
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.data.datasets import load_records, save_records
from components.rlhf.data.records import ValidationSample
from components.rlhf.rewards.environment import EnvironmentScorer
from components.rlhf.rewards.owner import Owner
from components.rlhf.rewards.rewards import Rewards
from components.rlhf.text.errors import InputError
from tests.support.ppo_ranks import ENVIRONMENT
from tests.support.ppo_runs import (
    PROMPTS,
    VALIDATION,
    completion,
    config_of,
    largest_gap,
    trainer_of,
    weights,
    without_times,
)
from tests.support.training import NEVER, checkpoints_every_step

OPTIONS: dict[str, Any] = {
    "num_iterations": 3,
    "num_epochs": 2,
    "eval_every": 2,
    "keep": "last",
    "environment": ENVIRONMENT,
    "rewards": [{"kind": "environment"}],
    "sampling": {"max_new_tokens": 12, "temperature": 2.0},
}


def run(
    sft: Path,
    reward_model: Path,
    *,
    checkpoints: CheckpointManager | None = None,
    interrupt_at: int = NEVER,
    **options: Any,
) -> PpoTrainer:
    """A trainer that is rewarded by the environment, with many stop tokens, so that there are several turns."""
    stage = config_of(**(OPTIONS | options))
    trainer = trainer_of(stage, sft, reward_model, checkpoints=checkpoints, interrupt_at=interrupt_at)
    trainer.rollout.stop_ids = (0, *range(1, 20))  # type: ignore[misc]
    scorers = {"environment": EnvironmentScorer(Owner(title="reward environment", key="ppo.rewards.0"))}
    trainer.learner = replace(trainer.learner, rewards=Rewards(scorers=scorers, weights={"environment": 1.0}))
    return trainer


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_killed_and_resumed_in_the_middle_it_ends_with_the_same_weights(
    tiny_model: Path, reward_model: Path, tmp_path: Path, advantage: str
) -> None:
    options = (
        {} if advantage == "gae" else {"advantage": "rloo", "rollout": {"num_prompts": 4, "samples_per_prompt": 2}}
    )
    whole = run(tiny_model, reward_model, **options)
    expected = whole.train(PROMPTS, VALIDATION)
    dying = run(
        tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"), interrupt_at=2, **options
    )
    with pytest.raises(KeyboardInterrupt):
        dying.train(PROMPTS, VALIDATION)
    again = run(tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"), **options)
    assert without_times(again.train(PROMPTS, VALIDATION)) == without_times(expected)
    assert largest_gap(weights(again), weights(whole)) == 0.0
    assert again.validation == whole.validation
    for row in expected:
        assert row["environment/turns"] > 1.2 and row["environment/tokens"] > 1
        assert row["environment/reward"] == pytest.approx(row["score/mean"], abs=1e-5)
    assert any(row["environment/failed"] > 0 for row in expected)  # of the prompt that the environment refuses
    assert "validation/environment/turns" in expected[1]
    for trainer in (whole, dying, again):
        trainer.close()


def test_samples_have_their_turns_on_disk(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    trainer = run(tiny_model, reward_model, num_iterations=1, eval_every=1)
    trainer.train(PROMPTS, VALIDATION)
    trainer.close()
    save_records(tmp_path, "validation", trainer.validation)
    found = load_records(tmp_path, "validation", ValidationSample)
    assert found == trainer.validation
    assert any(len(sample.turns) > 1 for sample in found)
    for sample in found:
        assert sample.response == "".join(turn.text for turn in sample.turns)
        assert sample.response_mask is not None and len(sample.response_mask) == len(sample.response_ids)


def test_first_ratio_is_exactly_1_and_failures_are_in_no_loss(tiny_model: Path, reward_model: Path) -> None:
    trainer = run(tiny_model, reward_model, num_iterations=1, num_epochs=1, eval_every=0)
    (row,) = trainer.train(PROMPTS, [])
    trainer.close()
    assert row["actor/first_ratio_error"] == 0.0
    assert row["kl/sequence"] == 0.0
    assert row["environment/failed"] > 0 and row["response/left_out"] == 0.0


def test_greedy_baseline_plays_too(tiny_model: Path, reward_model: Path) -> None:
    trainer = run(tiny_model, reward_model, advantage="remax", num_iterations=1, eval_every=0)
    seen = []
    assert trainer.sampler is not trainer.rollout
    plain = trainer.sampler.generate

    def generate(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        seen.append((options.get("greedy", False), found))
        return found

    trainer.sampler.generate = generate  # type: ignore[method-assign]
    trainer.train([p for p in PROMPTS if p.prompt != "So"], [])
    trainer.close()
    assert [greedy for greedy, _ in seen] == [False, True]
    assert all(c.environment_reward is not None for _, found in seen for c in found)


def test_response_whose_baseline_failed_is_not_learned_from(tiny_model: Path, reward_model: Path) -> None:
    trainer = run(tiny_model, reward_model, advantage="remax")
    completions = [replace(completion([5], [6, 7]), environment_reward=1.0, prompt=PROMPTS[3]) for _ in range(2)]
    found = trainer._with_baselines(completions)
    trainer.close()
    assert [c.failure for c in found] == ["raised ValueError: no game"] * 2


def test_reward_of_the_environment_needs_one() -> None:
    scorer = EnvironmentScorer(Owner(title="reward environment", key="ppo.rewards.0"))
    one = replace(completion([1], [2]), environment_reward=0.5)
    assert torch.equal(scorer.score([one]), torch.tensor([0.5]))
    with pytest.raises(InputError, match="needs an environment, and the response to prompt 'a prompt' has none"):
        scorer.score([one, completion([1], [2])])
