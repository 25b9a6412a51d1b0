"""The guard: what it sees in a rollout, and how a run stops or returns to its last good state."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from components.ppo import trainer as trainer_module
from components.ppo.guard import MAX_SAMPLES, find_collapse, samples_of
from components.ppo.policy import save_policy
from components.ppo.trainer import PpoTrainer
from components.rlhf.config.ppo import GuardConfig, PpoStageConfig
from components.rlhf.rewards.rewards import Rewards
from components.rlhf.text.errors import InputError, NonFiniteError
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
from tests.support.training import checkpoints_every_step

START = {"entropy": 2.0, "response/eos_rate": 0.8}
HEALTHY = {"kl/sequence": 9.0, "entropy": 1.5, "response/eos_rate": 0.7, "score/mean": 1.0}
ON = GuardConfig(action="stop")


@pytest.mark.parametrize(
    ("metrics", "config", "seen"),
    [
        ({}, ON, ""),
        ({"kl/sequence": 10.0}, ON, ""),
        ({"kl/sequence": 10.5}, ON, "the KL to the SFT model is 10.50 nats per response, above 10 (gate.max_kl)"),
        ({"kl/sequence": 10.5}, replaced := ON.model_copy(update={"max_kl": 12.0}), ""),
        ({"kl/sequence": 12.5}, replaced, "the KL to the SFT model is 12.50 nats per response, above 12 (ppo.guard.max_kl)"),
        ({"kl/sequence": -3.0}, ON, ""),
        ({"entropy": 0.2}, ON, ""),
        ({"entropy": 0.19}, ON, "the entropy is 0.19 nats per token, below 10% of the 2 at the start (ppo.guard.min_entropy)"),
        ({"entropy": 0.0}, ON.model_copy(update={"min_entropy": 0.0}), ""),
        ({"response/eos_rate": 0.4}, ON, ""),
        ({"response/eos_rate": 0.39}, ON, "39.0% of the responses end, below 50% of the 80.0% at the start (ppo.guard.min_eos_rate)"),
        ({"response/eos_rate": 0.0}, ON.model_copy(update={"min_eos_rate": 0.0}), ""),
        ({"score/mean": math.nan}, ON, "score/mean is nan"),
        ({"kl/sequence": math.inf}, ON, "kl/sequence is inf"),
    ],
)  # fmt: skip
def test_limits_are_inclusive_and_named(metrics: dict[str, float], config: GuardConfig, seen: str) -> None:
    assert find_collapse(HEALTHY | metrics, START, config, 10.0) == seen


@pytest.mark.parametrize(("start", "collapsed"), [(0.0, False), (0.09, False), (0.1, True)])
def test_eos_rate_is_watched_only_where_the_sft_model_ended(start: float, collapsed: bool) -> None:
    begin = START | {"response/eos_rate": start}
    assert bool(find_collapse(HEALTHY | {"response/eos_rate": 0.0}, begin, ON, 10.0)) == collapsed


def test_without_a_limit_any_kl_is_good() -> None:
    assert find_collapse(HEALTHY | {"kl/sequence": 1e6}, START, ON, None) == ""


def guarded(
    action: str, *, max_kl: float | None = None, guard: dict[str, Any] | None = None, **ppo: Any
) -> PpoStageConfig:
    own = {"action": action, "keep_every": 1} | (guard or {})
    return config_of(guard=own, **({"num_iterations": 5} | ppo)).model_copy(update={"max_kl": max_kl})


class Nan:
    """Updates of these iterations have a loss of nan, after they have changed the weights to nonsense."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *iterations: int) -> None:
        plain = trainer_module.update

        def update(learner: Any, experience: Any, *, seed: int, iteration: int) -> dict[str, float]:
            found = plain(learner, experience, seed=seed, iteration=iteration)
            if iteration in iterations:
                with torch.no_grad():
                    for engine in learner.engines.values():
                        for parameter in engine.module.parameters():
                            if parameter.requires_grad:
                                parameter.fill_(math.nan)
                raise NonFiniteError(f"loss/policy is nan at step {iteration} (epoch 0)")
            return found

        monkeypatch.setattr(trainer_module, "update", update)


def states_of(trainer: PpoTrainer) -> dict[int, dict[str, torch.Tensor]]:
    """Filled in as the trainer runs: its weights as each rollout is sampled, by iteration."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    plain = trainer._iterate

    def iterate(iteration: int, prompts: Any) -> Any:
        states[iteration] = weights(trainer)
        return plain(iteration, prompts)

    trainer._iterate = iterate  # type: ignore[method-assign]
    return states


def test_rollback_returns_to_the_last_good_state_with_half_the_rates(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Nan(monkeypatch, 3)
    trainer = trainer_of(guarded("rollback", critic={"learning_rate": 4e-3}), tiny_model, reward_model)
    states = states_of(trainer)
    history = trainer.train(PROMPTS, [])
    assert [row["guard/collapsed"] for row in history] == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert "loss/policy" not in history[2] and "score/mean" in history[2]
    # The state that sampled rollout 3 was good; what its update made of it is gone.
    assert largest_gap(states[4], states[3]) == 0.0
    assert largest_gap(states[5], states[4]) > 0
    assert [row.get("actor/learning_rate") for row in history] == [1e-3, 1e-3, None, 5e-4, 5e-4]
    assert [row.get("critic/learning_rate") for row in history] == [4e-3, 4e-3, None, 2e-3, 2e-3]
    said = (
        "guard, iteration 3: loss/policy is nan at step 3 (epoch 0); back to the policy after iteration 2, and training went on "
        "with half the learning rates; guard.jsonl of the model will have the responses"
    )
    assert said in capsys.readouterr().err
    assert trainer.outcome.numbers() == {"kept_iteration": 5.0, "guard_events": 1.0}


def test_rolled_back_optimizer_equals_that_of_the_good_state(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that only repeats iteration 1's state: moments of turned down updates must not stay, also where there were none before."""
    Nan(monkeypatch, 1)
    stage = guarded("rollback", num_iterations=2, guard={"keep_every": 5})
    trainer = trainer_of(stage, tiny_model, reward_model)
    trainer.train(PROMPTS, [])
    monkeypatch.undo()
    fresh = trainer_of(stage, tiny_model, reward_model)
    for engine in fresh.learner.engines.values():
        engine.peak /= 2
    fresh._iterate(2, PROMPTS)
    assert largest_gap(weights(trainer), weights(fresh)) == 0.0


@pytest.mark.parametrize("keep", ["best", "last"])
def test_stop_ends_the_run_with_its_kept_policy(
    tiny_model: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    Nan(monkeypatch, 4)
    trainer = trainer_of(guarded("stop", keep=keep, eval_every=1, kl_coef=1.0), tiny_model, reward_model)
    states = states_of(trainer)
    history = trainer.train(PROMPTS, VALIDATION)
    assert len(history) == 4
    assert "validation/objective" not in history[3]
    outcome = trainer.outcome
    assert outcome.reason.endswith("; the guard stopped the run in iteration 4")
    assert outcome.iteration == 3 if keep == "last" else outcome.iteration in (0, 1, 2, 3)
    actor = {name: weight for name, weight in weights(trainer).items() if name.startswith("actor")}
    expected = states[outcome.iteration + 1]
    assert max((actor[name] - expected[name]).abs().max().item() for name in actor) == 0.0
    save_policy(trainer, AutoTokenizer.from_pretrained(tiny_model), trainer.weights(), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "guard.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["iteration"] for row in rows} == {4}
    assert set(rows[0]) == {"iteration", "prompt_id", "prompt", "response", "truncated", "score", "kl"}
    assert sum(row["score"] for row in rows) / 8 == pytest.approx(history[3]["score/mean"], abs=1e-5)
    assert sum(row["kl"] for row in rows) / 8 == pytest.approx(history[3]["kl/sequence"], abs=1e-5)


def test_kl_above_the_limit_is_turned_down_before_its_update(tiny_model: Path, reward_model: Path) -> None:
    free = trainer_of(config_of(num_iterations=5, training={"learning_rate": 1e-2}), tiny_model, reward_model)
    kls = [row["kl/sequence"] for row in free.train(PROMPTS, [])]
    limit = (max(kls[:2]) + kls[2]) / 2
    assert kls[2] > limit
    stage = guarded(
        "rollback", max_kl=limit, training={"learning_rate": 1e-2}, guard={"max_rollbacks": 1, "keep_every": 1}
    )
    trainer = trainer_of(stage, tiny_model, reward_model)
    history = trainer.train(PROMPTS, [])
    assert [row["kl/sequence"] for row in history[:3]] == kls[:3]
    first = trainer.guard.events[0]
    assert (first.iteration, first.returned_to, first.stops) == (3, 1, False)
    assert f"above {limit:g} (gate.max_kl)" in first.seen
    assert all(row["kl/sequence"] <= limit or row["guard/collapsed"] for row in history)


def test_run_stops_after_the_last_rollback(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nan(monkeypatch, 2, 3, 5)
    trainer = trainer_of(guarded("rollback", num_iterations=9, guard={"max_rollbacks": 2}), tiny_model, reward_model)
    history = trainer.train(PROMPTS, [])
    assert [(event.iteration, event.stops) for event in trainer.guard.events] == [(2, False), (3, False), (5, True)]
    assert len(history) == 5
    assert history[3]["actor/learning_rate"] == 2.5e-4
    assert trainer.outcome.iteration == 4


@pytest.mark.parametrize("interrupt_at", [3, 4, 6])
def test_resumed_run_with_a_rollback_equals_an_uninterrupted_one(
    tiny_model: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt_at: int
) -> None:
    Nan(monkeypatch, 3)
    options: dict[str, Any] = {"num_iterations": 6, "eval_every": 2, "kl_target": 0.5, "kl_horizon": 16.0}
    stage = guarded("rollback", guard={"keep_every": 2}, **options)
    whole = trainer_of(stage, tiny_model, reward_model)
    expected = whole.train(PROMPTS, VALIDATION)
    dying = trainer_of(
        stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"), interrupt_at=interrupt_at
    )
    with pytest.raises(KeyboardInterrupt):
        dying.train(PROMPTS, VALIDATION)
    resumed = trainer_of(stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    assert without_times(resumed.train(PROMPTS, VALIDATION)) == without_times(expected)
    assert largest_gap(weights(resumed), weights(whole)) == 0.0
    assert resumed.outcome == whole.outcome and resumed.guard.memory == whole.guard.memory


def test_reward_that_is_not_finite_turns_back_and_keeps_the_responses(tiny_model: Path, reward_model: Path) -> None:
    stage = guarded("rollback", num_iterations=4)
    trainer = trainer_of(stage, tiny_model, reward_model)
    plain, calls = trainer.learner.models.scorer, iter(range(9))

    class Sick:
        def score(self, completions: Any, computed: Any = None) -> torch.Tensor:
            scores = plain.score(completions, computed)
            return torch.full_like(scores, math.inf) if next(calls) == 2 else scores

    rewards = Rewards(scorers={"reward_model": Sick()}, weights={"reward_model": 1.0})
    trainer.learner = replace(trainer.learner, rewards=rewards)
    history = trainer.train(PROMPTS, [])
    assert [row["guard/collapsed"] for row in history] == [0.0, 0.0, 1.0, 0.0]
    assert history[2].keys() == {"iteration", "kl/coef", "guard/collapsed"}
    assert "as inf (8 of 8 scores are not finite)" in trainer.guard.events[0].seen
    assert [sample.score for sample in trainer.guard.memory.samples] == [None] * 8
    assert json.dumps(trainer.guard.state(), allow_nan=False)


def test_without_a_guard_and_without_a_good_state_the_error_ends_the_run(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nan(monkeypatch, 2)
    with pytest.raises(InputError, match="loss/policy is nan at step 2"):
        trainer_of(config_of(), tiny_model, reward_model).train(PROMPTS, [])
    sick = trainer_of(guarded("rollback"), tiny_model, reward_model, reward=lambda _p, _r: math.nan)
    with pytest.raises(InputError, match="as nan"):
        sick.train(PROMPTS, [])


def test_guard_that_sees_nothing_changes_nothing(tiny_model: Path, reward_model: Path) -> None:
    plain, watched = (
        trainer_of(stage, tiny_model, reward_model) for stage in (config_of(), guarded("stop", num_iterations=2))
    )
    rows = [without_times(trainer.train(PROMPTS, [])) for trainer in (plain, watched)]
    assert rows[1] == [row | {"guard/collapsed": 0.0} for row in rows[0]]
    assert largest_gap(weights(plain), weights(watched)) == 0.0


def test_samples_are_spread_over_a_large_rollout() -> None:
    rollout = [completion([1], [2], prompt=str(row)) for row in range(1000)]
    rows = [int(sample.prompt) for sample in samples_of(7, rollout, None, limit=MAX_SAMPLES)]
    assert len(rows) == 250 and rows[:3] == [0, 4, 8]
    assert len(samples_of(7, rollout[:3], None, limit=MAX_SAMPLES)) == 3
