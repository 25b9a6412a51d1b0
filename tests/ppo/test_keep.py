"""Which policy is exported: the best validation objective within the limit of the KL, also after a run was killed."""

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from components.ppo.keep import Outcome, is_better, why_best
from components.ppo.policy import save_policy
from components.ppo.trainer import PpoTrainer
from components.ppo.validation import Evaluation, objective_of
from components.rlhf.config.model import LoraConfig
from components.rlhf.text.errors import InputError
from tests.ppo.test_trainer import follow
from tests.support.ppo_runs import PROMPTS, VALIDATION, config_of, largest_gap, trainer_of, weights
from tests.support.training import checkpoints_every_step


def evaluation(objective: float, kl: float, iteration: int = 1) -> Evaluation:
    return Evaluation(iteration=iteration, objective=objective, kl=kl)


@pytest.mark.parametrize(
    ("new", "kept", "max_kl", "better"),
    [
        ((1.0, 5.0), None, 10.0, True),
        ((2.0, 5.0), (1.0, 5.0), 10.0, True),
        ((1.0, 1.0), (1.0, 5.0), 10.0, False),  # a tie keeps the earlier one
        ((9.0, 10.0), (1.0, 0.0), 10.0, True),  # the limit itself is within it
        ((9.0, 10.1), (1.0, 0.0), 10.0, False),
        ((9.0, 10.1), (1.0, 0.0), None, True),
        ((-5.0, 9.0), (1.0, 11.0), 10.0, True),  # within beats above, whatever the objective
        ((-5.0, 11.0), (1.0, 12.0), 10.0, True),  # both above: the smaller KL
        ((5.0, 12.0), (1.0, 11.0), 10.0, False),
        ((math.nan, 1.0), (1.0, 5.0), 10.0, False),
        ((5.0, math.nan), (1.0, 5.0), 10.0, False),
    ],
)
def test_better_is_the_higher_objective_within_the_limit(
    new: tuple[float, float], kept: tuple[float, float] | None, max_kl: float | None, better: bool
) -> None:
    assert is_better(evaluation(*new), None if kept is None else evaluation(*kept), max_kl) == better


NUMBERS = st.tuples(st.integers(-3, 3), st.integers(-1, 4))


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.integers(-2, 4))
def test_taking_the_better_one_after_another_finds_the_best_of_all(pairs: list[tuple[int, int]], max_kl: int) -> None:
    kept = None
    for number, (objective, kl) in enumerate(pairs):
        new = evaluation(float(objective), float(kl), number)
        kept = new if is_better(new, kept, float(max_kl)) else kept
    within = [(-objective, number) for number, (objective, kl) in enumerate(pairs) if kl <= max_kl]
    above = [(kl, number) for number, (_, kl) in enumerate(pairs)]
    assert kept is not None and kept.iteration == min(within or above)[1]


def test_objective_charges_the_fixed_coefficient_for_the_kl() -> None:
    assert objective_of(2.0, 4.0, kl_coef=0.25) == 1.0
    assert objective_of(2.0, -4.0, kl_coef=0.25) == 3.0


def kept_run(
    tiny_model: Path, reward_model: Path, scores: list[float], *, max_kl: float | None = None, **ppo: Any
) -> tuple[PpoTrainer, dict[int, dict[str, Tensor]]]:
    """A run with these validation scores, and its actor's weights at each evaluation."""
    stage = config_of(**({"num_iterations": 4, "eval_every": 1, "kl_coef": 0.0} | ppo))
    trainer = trainer_of(stage.model_copy(update={"max_kl": max_kl}), tiny_model, reward_model)
    follow(trainer, scores)
    actors: dict[int, dict[str, Tensor]] = {}
    plain = trainer.keeper.add

    def add(new: Evaluation) -> None:
        actors[new.iteration] = actor_of(trainer)
        plain(new)

    trainer.keeper.add = add  # type: ignore[method-assign]
    trainer.train(PROMPTS, VALIDATION)
    return trainer, actors


def actor_of(trainer: PpoTrainer) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights(trainer).items() if name.startswith("actor.")}


@pytest.mark.parametrize(
    ("scores", "keep", "expected"),
    [
        ([0.0, 1.0, 3.0, 2.0, 2.5], None, 2),
        ([0.0, 1.0, 3.0, 2.0, 2.5], "last", 4),
        ([5.0, 1.0, 3.0, 2.0, 2.5], "best", 0),  # nothing is better than the SFT model
        ([0.0, 1.0, 3.0, 2.0, 9.0], "best", 4),
        ([0.0, 1.0, 3.0, 3.0, 3.0], "best", 2),
    ],
)
def test_exported_policy_is_that_of_the_best_evaluation(
    tiny_model: Path, reward_model: Path, scores: list[float], keep: str | None, expected: int
) -> None:
    trainer, actors = kept_run(tiny_model, reward_model, scores, keep=keep)
    assert trainer.outcome.iteration == expected
    assert trainer.outcome.kept is not None and trainer.outcome.kept.objective == scores[expected]
    assert largest_gap(actor_of(trainer), actors[expected]) == 0.0
    others = [largest_gap(actors[expected], other) for number, other in actors.items() if number != expected]
    assert min(others) > 0
    exported = {f"actor.{name}": weight for name, weight in trainer.weights()}
    assert largest_gap(exported, actors[expected]) == 0.0


def test_policy_above_the_limit_of_the_kl_is_not_exported(tiny_model: Path, reward_model: Path) -> None:
    scores = [0.0, 1.0, 2.0, 3.0, 4.0]
    options: dict[str, Any] = {"training": {"learning_rate": 1e-2}}
    free, _ = kept_run(tiny_model, reward_model, scores, **options)
    kls = [each.kl for each in free.keeper.evaluations]
    assert free.outcome.iteration == 4 and kls[0] == 0.0
    limit = sorted(kls)[2]
    allowed = max(number for number, kl in enumerate(kls) if kl <= limit)
    assert allowed < 4
    trainer, actors = kept_run(tiny_model, reward_model, scores, max_kl=limit, **options)
    assert trainer.outcome.iteration == allowed
    assert largest_gap(actor_of(trainer), actors[allowed]) == 0.0
    assert f"with a KL of at most {limit:g} (objective {scores[allowed]:.4g}, KL " in trainer.outcome.reason


def test_training_reward_does_not_choose_the_policy(tiny_model: Path, reward_model: Path) -> None:
    """Rewards of the rollouts rise with every iteration, those of the validation prompts fall."""
    trainer, _ = kept_run(tiny_model, reward_model, [4.0, 3.0, 2.0, 1.0, 0.0])
    assert trainer.outcome.iteration == 0


def test_objective_counts_the_eos_penalty_and_the_clip_and_not_the_adapted_coefficient(
    tiny_model: Path, reward_model: Path
) -> None:
    stage = config_of(
        num_iterations=3,
        eval_every=1,
        kl_coef=0.3,
        kl_target=1e-3,
        kl_horizon=4.0,
        reward_clip=0.6,
        missing_eos_penalty=0.5,
        training={"learning_rate": 5e-3},
    )
    trainer = trainer_of(stage, tiny_model, reward_model)
    history = trainer.train(PROMPTS, VALIDATION)
    coefficients = [row["kl/coef"] for row in history]
    assert coefficients[2] > coefficients[1] != coefficients[0]
    for row in history:
        samples = [sample for sample in trainer.validation if sample.iteration == row["iteration"]]
        rewards = [min(max(sample.score - 0.5 * sample.truncated, -0.6), 0.6) for sample in samples]
        expected = sum(r - 0.3 * sample.kl for r, sample in zip(rewards, samples, strict=True)) / len(samples)
        assert row["validation/objective"] == pytest.approx(expected, abs=1e-5)
        assert row["validation/objective"] != pytest.approx(
            row["validation/score/mean"] - 0.3 * row["validation/kl/sequence"], abs=1e-3
        )


def test_policy_that_improves_at_every_evaluation_does_not_stop(tiny_model: Path, reward_model: Path) -> None:
    """Its score rises faster than the KL costs at kl_coef, but not at the coefficient that the controller raises."""
    options: dict[str, Any] = {
        "kl_coef": 0.1,
        "kl_target": 1e-3,
        "kl_horizon": 4.0,
        "patience": 2,
        "num_iterations": 5,
        "training": {"learning_rate": 5e-3},
    }
    measured, _ = kept_run(tiny_model, reward_model, [0.0] * 6, **(options | {"patience": 0}))
    kls = [each.kl for each in measured.keeper.evaluations]
    scores = [0.1 * kl + 0.01 * number for number, kl in enumerate(kls)]
    trainer, _ = kept_run(tiny_model, reward_model, scores, **options)
    objectives = [each.objective for each in trainer.keeper.evaluations]
    assert objectives == pytest.approx([0.01 * number for number in range(6)], abs=1e-5)
    assert len(trainer.history) == 5 and trainer.outcome.iteration == 5
    coefficients = [*(row["kl/coef"] for row in trainer.history[1:]), trainer.kl_coef]  # after each iteration
    costs = [0.0, *(coef * kl for coef, kl in zip(coefficients, kls[1:], strict=True))]
    moving = [score - cost for score, cost in zip(scores, costs, strict=True)]
    worse = [value <= max(moving[:number]) for number, value in enumerate(moving) if number]
    assert any(a and b for a, b in itertools.pairwise(worse))  # it would have stopped the run


@pytest.mark.parametrize(
    "lora", [None, LoraConfig(rank=8, alpha=16.0), LoraConfig(rank=8, alpha=16.0, quantization="nf4")]
)
@pytest.mark.parametrize("interrupt_at", [2, 4])
def test_killed_run_exports_the_same_bytes_as_an_uninterrupted_one(
    tiny_model: Path, reward_model: Path, tmp_path: Path, lora: LoraConfig | None, interrupt_at: int
) -> None:
    """The best evaluation is before the kill (2), or after it and before the end (3)."""
    scores = [0.0, 1.0, 3.0, 2.0, 2.5] if interrupt_at == 4 else [0.0, 1.0, 2.0, 3.0, 2.5]
    best = scores.index(3.0)
    stage = config_of(frozen=1, lora=lora, num_iterations=4, eval_every=1, kl_coef=0.0)

    def run(name: str, scores: list[float], **options: Any) -> PpoTrainer:
        trainer = trainer_of(stage, tiny_model, reward_model, **options)
        follow(trainer, scores)
        trainer.train(PROMPTS, VALIDATION)
        save_policy(trainer, AutoTokenizer.from_pretrained(tiny_model), trainer.weights(), tmp_path / name)
        return trainer

    whole = run("whole", scores)
    with pytest.raises(KeyboardInterrupt):
        run("dead", scores, checkpoints=checkpoints_every_step(tmp_path, "ppo"), interrupt_at=interrupt_at)
    rest = scores[interrupt_at:]  # the checkpoint after the iteration before has the scores until then
    again = run("again", rest, checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    assert again.outcome == whole.outcome and whole.outcome.iteration == best
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")
    last = actor_of(trainer_of(stage, tiny_model, reward_model))
    assert largest_gap(actor_of(whole), last) > 0  # not the SFT model


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_run_that_cannot_evaluate_exports_the_last_policy_or_is_refused(
    tiny_model: Path, reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(config_of(eval_every=1), tiny_model, reward_model)
    trainer.train(PROMPTS, [])
    assert (trainer.outcome.iteration, trainer.outcome.reason, trainer.outcome.kept) == (2, "the last one", None)
    assert "the last policy will be exported: there are no validation prompts" in capsys.readouterr().err
    with pytest.raises(InputError, match="ppo.keep is best, but there are no validation prompts"):
        trainer_of(config_of(eval_every=1, keep="best"), tiny_model, reward_model).train(PROMPTS, [])


def test_best_policy_needs_no_store_and_leaves_nothing_behind(
    tiny_model: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer, actors = kept_run(tiny_model, reward_model, [0.0, 3.0, 1.0, 1.0, 1.0])
    assert largest_gap(actor_of(trainer), actors[1]) == 0.0
    assert [path.name for path in tmp_path.glob("rlhf-kept-*/ppo/x/*")] == sorted(
        path.name for path in tmp_path.glob("rlhf-kept-*/ppo/x/best-00000001-*")
    )
    trainer.checkpoints.release()
    assert list(tmp_path.iterdir()) == []


def test_facts_are_flat_and_say_why() -> None:
    kept = evaluation(1.23456, 3.2, 12)
    outcome = Outcome(iteration=12, reason=why_best(kept, [*[kept] * 6, evaluation(9.0, 12.0)], 10.0), kept=kept)
    assert outcome.facts() == {
        "kept_reason": "the exported policy is the policy after iteration 12: the best validation objective of the 6 of 7 evaluations "
        "with a KL of at most 10 (objective 1.235, KL 3.2 nats per response)"
    }
    assert outcome.numbers() == {"kept_iteration": 12.0, "kept_objective": 1.23456, "kept_kl": 3.2}
    far = evaluation(1.0, 12.0, 3)
    assert why_best(far, [far, far], 10.0).startswith(
        "none of 2 evaluations has a KL of at most 10, and this one has the smallest"
    )
