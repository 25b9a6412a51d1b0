import itertools
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from components.ppo.curves import PANELS
from components.ppo.metrics import final_metrics
from components.ppo.trainer import PpoTrainer, local_rows, share_rollout
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.data import batching
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.group import SingleProcess
from components.rlhf.maths.kl import adapt_kl_coef
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.text.errors import InputError
from tests.support.ppo_runs import (
    PROMPTS,
    VALIDATION,
    Row,
    completion,
    config_of,
    largest_gap,
    load,
    share_of_low_ids,
    trainer_of,
    weights,
    without_times,
)
from tests.support.training import checkpoints_every_step


def number_of(value: float) -> Any:
    """A reward that is the same for every response."""
    return lambda _prompt, _response: value


def test_history_has_every_curve_and_only_numbers(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(eval_every=1), tiny_model, reward_model)
    history = trainer.train(PROMPTS, VALIDATION)
    assert [row["iteration"] for row in history] == [1.0, 2.0]
    for row in history:
        assert {name for name, _ in PANELS} <= set(row)
        for name, _ in PANELS[:5]:
            assert f"validation/{name}" in row
        assert all(isinstance(value, float) and math.isfinite(value) for value in row.values()), row
    assert set(history[0]) == set(history[1])


def test_tracked_metrics_equal_the_history(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(), tiny_model, reward_model)
    history = trainer.train(PROMPTS, [])
    rows = trainer.tracker.rows
    assert [{"iteration": float(step), **row} for step, row in rows.items()] == history


def test_final_metrics_are_the_last_row_under_flat_names() -> None:
    first, last = {"score/mean": 0.5, "kl/sequence": 0.0}, {"score/mean": 2.0, "kl/sequence": 3.0}
    assert final_metrics([first, last]) == {
        "num_iterations": 2.0,
        "score_first": 0.5,
        "score_mean": 2.0,
        "kl_sequence": 3.0,
    }


def asked(trainer: PpoTrainer, prompts: list[Prompt], iterations: int) -> list[list[str]]:
    return [[p.id for p in trainer._prompts_of(i, prompts)] for i in range(1, iterations + 1)]


def test_every_epoch_takes_each_prompt_once_in_a_new_order(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(rollout={"num_prompts": 4}), tiny_model, reward_model)
    prompts = [Prompt(prompt="a", id=str(i)) for i in range(10)]
    stream = sum(asked(trainer, prompts, 10), [])
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(p.id for p in prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_iteration_may_need_more_prompts_than_there_are(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(), tiny_model, reward_model)
    for ids in asked(trainer, PROMPTS[:3], 3):
        assert len(ids) == 8
        assert min(ids.count(p.id) for p in PROMPTS[:3]) >= 2


def test_samples_per_prompt_are_consecutive_rows(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = config_of(rollout={"num_prompts": 4, "samples_per_prompt": 3}, minibatch=6)
    trainer = trainer_of(stage, tiny_model, reward_model)
    calls: list[Any] = []
    plain = trainer.rollout.generate

    def recording(prompts: Any, sampling: Any, seeds: Any) -> Any:
        found = plain(prompts, sampling, seeds)
        calls.append((prompts, seeds, found))
        return found

    monkeypatch.setattr(trainer.rollout, "generate", recording)
    trainer.train([Prompt(prompt="a", id=str(i)) for i in range(9)], [])
    every = []
    for prompts, seeds, found in calls:
        assert len(found) == 12
        ids = [p.id for p in prompts]
        assert (
            [ids[i] for i in range(0, 12, 3)] == [ids[i] for i in range(1, 12, 3)] == [ids[i] for i in range(2, 12, 3)]
        )
        assert len(set(ids)) == 4
        assert len({tuple(c.response_ids) for c in found}) > 9  # samples of one prompt differ
        every += seeds
    assert len(set(every)) == 24


def test_same_seed_gives_the_same_run(tiny_model: Path, reward_model: Path) -> None:
    runs = [trainer_of(config_of(eval_every=2, keep="last"), tiny_model, reward_model) for _ in range(2)]
    torch.manual_seed(1)
    first = runs[0].train(PROMPTS, VALIDATION)
    torch.manual_seed(2)  # torch's global generator has no effect
    second = runs[1].train(PROMPTS, VALIDATION)
    assert without_times(first) == without_times(second)
    assert largest_gap(weights(runs[0]), weights(runs[1])) == 0.0


def test_different_seed_gives_a_different_run(tiny_model: Path, reward_model: Path) -> None:
    rows = [
        trainer_of(config_of(seed=seed, num_iterations=1), tiny_model, reward_model).train(PROMPTS, [])[0]
        for seed in (1, 2)
    ]
    assert rows[0]["score/mean"] != rows[1]["score/mean"]


@pytest.mark.parametrize("seed", [20_240_101, 2**31 - 1])
def test_largest_allowed_seed_works(tiny_model: Path, reward_model: Path, seed: int) -> None:
    assert trainer_of(config_of(seed=seed, num_epochs=2), tiny_model, reward_model).train(PROMPTS, [])


COEFFICIENTS = (0.0, 0.5, 5.0)


@pytest.fixture(scope="module")
def histories(tiny_model: Path, reward_model: Path) -> dict[float, list[Row]]:
    found = {}
    for kl_coef in COEFFICIENTS:
        stage = config_of(
            num_iterations=12,
            num_epochs=2,
            minibatch=64,
            kl_coef=kl_coef,
            rollout={"num_prompts": 128},
            sampling={"batch_size": 128, "max_new_tokens": 4, "min_new_tokens": 4},
            training={"learning_rate": 3e-3, "schedule": "linear", "min_learning_rate_fraction": 0.0},
            critic={"learning_rate": 1e-2},
        )
        trainer = trainer_of(stage, tiny_model, reward_model, reward=lambda p, r: 3 * share_of_low_ids(p, r))
        found[kl_coef] = trainer.train(PROMPTS, [])
    return found


# A run that rewards tokens below 128, without a KL penalty, with one, and with one that outweighs the reward.


def final(history: list[Row], name: str) -> float:
    return sum(row[name] for row in history[-3:]) / 3


def test_score_rises_during_training(histories: dict[float, list[Row]]) -> None:
    assert final(histories[0.0], "score/mean") > histories[0.0][0]["score/mean"] + 0.3


def test_higher_kl_coef_gives_lower_kl(histories: dict[float, list[Row]]) -> None:
    free, dear, dearest = (final(histories[kl_coef], "kl/sequence") for kl_coef in COEFFICIENTS)
    assert free > 1.5 * dear
    assert dear > 1.3 * dearest


def test_higher_kl_coef_gives_a_lower_score(histories: dict[float, list[Row]]) -> None:
    free, dear, dearest = (final(histories[kl_coef], "score/mean") for kl_coef in COEFFICIENTS)
    assert free > dear > dearest


def test_fixed_kl_coef_does_not_change(tiny_model: Path, reward_model: Path) -> None:
    history = trainer_of(config_of(kl_coef=0.3), tiny_model, reward_model).train(PROMPTS, [])
    assert [row["kl/coef"] for row in history] == [0.3, 0.3]


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("target", [1e-4, 1e4])
def test_adaptive_kl_coef_moves_towards_its_target(
    tiny_model: Path, reward_model: Path, target: float, per: str
) -> None:
    stage = config_of(kl_coef=0.3, kl_target=target, kl_target_per=per, kl_horizon=16.0, num_iterations=3)
    trainer = trainer_of(stage, tiny_model, reward_model)
    history = trainer.train(PROMPTS, [])
    coefficients = [*(row["kl/coef"] for row in history), trainer.kl_coef]
    assert coefficients[0] == 0.3
    # The first rollout has a KL of exactly 0: down by a fifth times 8 samples of a horizon of 16.
    assert coefficients[1] == pytest.approx(0.3 * (1 - 0.2 * 8 / 16))
    for (before, after), row in zip(itertools.pairwise(coefficients), history, strict=True):
        expected = adapt_kl_coef(before, row[f"kl/{per}"], target=target, horizon=16.0, num_samples=8)
        assert after == expected
    up = coefficients[3] > coefficients[2]
    assert up == (history[2][f"kl/{per}"] > target)


def test_target_per_token_and_target_per_sequence_of_one_run_differ(tiny_model: Path, reward_model: Path) -> None:
    """Between the two KLs of the second rollout, the one target is exceeded and the other is not."""
    options: dict[str, Any] = {"kl_coef": 0.3, "kl_horizon": 16.0, "training": {"learning_rate": 1e-2}}
    row = trainer_of(config_of(**options), tiny_model, reward_model).train(PROMPTS, [])[1]
    assert 0 < row["kl/token"] < row["kl/sequence"] / 2
    target = (row["kl/token"] * row["kl/sequence"]) ** 0.5
    last = {}
    for per in ("sequence", "token"):
        trainer = trainer_of(config_of(kl_target=target, kl_target_per=per, **options), tiny_model, reward_model)
        trainer.train(PROMPTS, [])
        last[per] = trainer.kl_coef
    start = 0.3 * (1 - 0.2 * 8 / 16)  # after the first rollout, whose KL is 0
    assert last == {"sequence": pytest.approx(start * 1.1), "token": pytest.approx(start * 0.9)}


def evals(
    tiny_model: Path,
    reward_model: Path,
    scores: list[float],
    *,
    checkpoints: CheckpointManager | None = None,
    **ppo: Any,
) -> PpoTrainer:
    """A run whose validation scores are the given ones, one per evaluation."""
    stage = config_of(**({"num_iterations": 9, "eval_every": 1, "patience": 2, "kl_coef": 0.0} | ppo))
    trainer = trainer_of(stage, tiny_model, reward_model, checkpoints=checkpoints)
    follow(trainer, scores)
    return trainer


def test_training_stops_after_patience_evaluations_without_improvement(tiny_model: Path, reward_model: Path) -> None:
    trainer = evals(tiny_model, reward_model, [0.0, 1.0, 3.0, 2.0, 4.0, 4.0, 3.75, 99.0])
    history = trainer.train(PROMPTS, VALIDATION)
    assert [row["validation/objective"] for row in history] == [1.0, 3.0, 2.0, 4.0, 4.0, 3.75]


def test_validation_runs_every_eval_every_iterations(tiny_model: Path, reward_model: Path) -> None:
    trainer = evals(tiny_model, reward_model, [0.0, 1.0, 0.5, 0.4, 99.0], eval_every=2)
    history = trainer.train(PROMPTS, VALIDATION)
    assert len(history) == 6
    assert ["validation/objective" in row for row in history] == [False, True] * 3


def test_training_never_stops_early_without_patience(tiny_model: Path, reward_model: Path) -> None:
    trainer = evals(tiny_model, reward_model, [4.0, 3.0, 2.0, 1.0, 0.0], patience=0, num_iterations=4)
    assert len(trainer.train(PROMPTS, VALIDATION)) == 4


def test_run_interrupted_after_convergence_stays_converged(
    tiny_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    scores = [0.0, 1.0, 0.5, 0.4, 99.0]
    first = evals(tiny_model, reward_model, scores, checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    history = first.train(PROMPTS, VALIDATION)  # interrupted before its artifact is written
    assert len(history) == 3
    again = evals(tiny_model, reward_model, scores[4:], checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    assert again.train(PROMPTS, VALIDATION) == history
    assert largest_gap(weights(again), weights(first)) == 0.0


def test_model_that_never_improves_on_its_start_has_converged(tiny_model: Path, reward_model: Path) -> None:
    trainer = evals(tiny_model, reward_model, [5.0, 1.0, 2.0, 99.0])
    assert len(trainer.train(PROMPTS, VALIDATION)) == 2


def test_validation_objective_is_score_minus_kl_cost(tiny_model: Path, reward_model: Path) -> None:
    history = trainer_of(config_of(kl_coef=0.7, eval_every=1), tiny_model, reward_model).train(PROMPTS, VALIDATION)
    for row in history:
        expected = row["validation/score/mean"] - 0.7 * row["validation/kl/sequence"]
        assert row["validation/objective"] == pytest.approx(expected)
    assert history[1]["validation/kl/sequence"] != 0  # validation uses the trained policy


def test_validation_uses_the_same_draws_every_time(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(eval_every=1, training={"learning_rate": 1e-12}, critic={"learning_rate": 1e-12})
    rows = trainer_of(stage, tiny_model, reward_model).train(PROMPTS, VALIDATION)
    evals = [{name: value for name, value in row.items() if name.startswith("validation/")} for row in rows]
    assert evals[0] == pytest.approx(evals[1], abs=1e-4)


# Responses to the validation prompts are kept, so that the judge can score them later.


def test_validation_samples_include_the_model_before_the_first_update(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(num_iterations=4, eval_every=2), tiny_model, reward_model)
    history = trainer.train(PROMPTS, VALIDATION)
    size = len(VALIDATION)
    assert [s.iteration for s in trainer.validation] == [0] * size + [2] * size + [4] * size
    batch = trainer.ppo.rollout.num_prompts
    assert [s.num_rollouts for s in trainer.validation[::size]] == [0, 2 * batch, 4 * batch]
    assert [s.prompt for s in trainer.validation[:size]] == VALIDATION
    tokenizer = trainer.rollout.tokenizer
    for sample in trainer.validation:
        assert tokenizer.decode(sample.prompt_ids) == sample.prompt.prompt
        assert tokenizer.decode(sample.response_ids, skip_special_tokens=True) == sample.response
    assert [s.kl for s in trainer.validation[:size]] == [0.0] * size  # the SFT model
    last = trainer.validation[-size:]
    row = history[-1]
    assert sum(s.score for s in last) / size == pytest.approx(row["validation/score/mean"], abs=1e-5)
    assert sum(s.kl for s in last) / size == pytest.approx(row["validation/kl/sequence"], abs=1e-5)
    assert sum(len(s.response_ids) for s in last) / size == pytest.approx(row["validation/response/length"])
    assert sum(not s.truncated for s in last) / size == pytest.approx(row["validation/response/eos_rate"])


def test_first_validation_is_tracked_at_step_0(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(eval_every=1), tiny_model, reward_model)
    trainer.train(PROMPTS, VALIDATION)
    assert trainer.tracker.rows[0]["validation/kl/sequence"] == 0.0


def test_no_validation_samples_without_validation(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(), tiny_model, reward_model)
    trainer.train(PROMPTS, VALIDATION)
    assert trainer.validation == []
    assert 0 not in trainer.tracker.rows


def test_validation_samples_survive_an_interruption(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    whole = trainer_of(config_of(num_iterations=3, eval_every=1), tiny_model, reward_model)
    whole.train(PROMPTS, VALIDATION)
    stage = config_of(num_iterations=3, eval_every=1)
    first = trainer_of(stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    first.ppo = first.ppo.model_copy(update={"num_iterations": 2})
    first.train(PROMPTS, VALIDATION)
    again = trainer_of(stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    again.train(PROMPTS, VALIDATION)
    assert again.validation == whole.validation


def follow(trainer: PpoTrainer, scores: list[float]) -> None:
    """Replace the validation scores of a run by these, one per evaluation."""
    remaining = iter(scores)
    plain = trainer.rollout.generate
    state = {"looking": False, "score": 0.0}

    def generate(prompts: Any, sampling: Any, seeds: Any) -> Any:
        state["looking"] = prompts[0].id.startswith("validation")
        if state["looking"]:
            state["score"] = next(remaining)
        return plain(prompts, sampling, seeds)

    trainer.rollout.generate = generate
    scorer = trainer.learner.models.scorer
    plain_score = scorer.score
    scorer.score = lambda completions, computed: (
        torch.full((len(completions),), state["score"]) if state["looking"] else plain_score(completions, computed)
    )


OPTIONS: dict[str, Any] = {
    "num_iterations": 4,
    "num_epochs": 2,
    "eval_every": 2,
    "keep": "last",
    "kl_target": 0.5,
    "kl_horizon": 16.0,
    "training": {"schedule": "cosine", "warmup_fraction": 0.3},
}


@pytest.mark.parametrize("interrupt_at", [2, 4])
@pytest.mark.parametrize(("frozen", "trains"), [(0, "layers"), (2, "layers"), (1, "head")])
def test_resumed_run_equals_an_uninterrupted_one(
    tiny_model: Path, reward_model: Path, tmp_path: Path, interrupt_at: int, frozen: int, trains: str
) -> None:
    stage = config_of(frozen=frozen, critic={"trains": trains}, **OPTIONS)
    undisturbed = trainer_of(stage, tiny_model, reward_model)
    expected = undisturbed.train(PROMPTS, VALIDATION)
    dying = trainer_of(
        stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"), interrupt_at=interrupt_at
    )
    with pytest.raises(KeyboardInterrupt):
        dying.train(PROMPTS, VALIDATION)
    resumed = trainer_of(stage, tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo"))
    assert without_times(resumed.train(PROMPTS, VALIDATION)) == without_times(expected)
    assert largest_gap(weights(resumed), weights(undisturbed)) == 0.0
    assert resumed.kl_coef == undisturbed.kl_coef
    assert resumed.keeper.state() == undisturbed.keeper.state()
    assert set(resumed.tracker.rows) == set(range(interrupt_at, 5))


def test_checkpoint_with_other_frozen_layers_is_refused(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    trainer_of(config_of(), tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo")).train(
        PROMPTS, []
    )
    other = trainer_of(
        config_of(frozen=1), tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo")
    )
    with pytest.raises(InputError, match="holds a different set of trained weights"):
        other.train(PROMPTS, [])


def test_pad_equal_to_eos_changes_nothing(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    """The same models with another pad id give the same metrics and weights."""
    folders = []
    for folder in (tiny_model, reward_model):
        copy = tmp_path / f"other-{len(folders)}"
        shutil.copytree(folder, copy)
        tokenizer = AutoTokenizer.from_pretrained(copy)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(200)
        tokenizer.save_pretrained(copy)
        config = AutoConfig.from_pretrained(copy)
        config.pad_token_id = 200
        config.save_pretrained(copy)
        if (copy / "generation_config.json").is_file():
            GenerationConfig(eos_token_id=0, pad_token_id=200).save_pretrained(copy)
        folders.append(copy)
    assert load_tokenizer(tiny_model).pad_token_id == load_tokenizer(tiny_model).eos_token_id == 0
    assert load_tokenizer(folders[0]).pad_token_id == 200
    options: dict[str, Any] = {"frozen": 1, "missing_eos_penalty": 1.0, "sampling": {"temperature": 2.0}}
    runs = [trainer_of(config_of(**options), *pair) for pair in ((tiny_model, reward_model), folders)]
    for run in runs:
        distribution = SamplingDistribution(temperature=2.0, stop_ids=(0, 200, *range(1, 50)))
        run.learner = replace(run.learner, distribution=distribution)
        run.rollout.stop_ids = distribution.stop_ids
    histories = [without_times(run.train(PROMPTS, [])) for run in runs]
    assert histories[0] == histories[1]
    assert 0 < histories[0][0]["response/eos_rate"] < 1
    assert largest_gap(weights(runs[0]), weights(runs[1])) == 0.0


def test_rollout_samples_from_the_trained_weights(tiny_model: Path, reward_model: Path) -> None:
    for frozen in (0, 2):
        trainer = trainer_of(config_of(frozen=frozen), tiny_model, reward_model)
        history = trainer.train(PROMPTS, [])
        ours = dict(trainer.learner.models.actor.lm.named_parameters())
        assert all(torch.equal(p, ours[name]) for name, p in trainer.rollout.model.named_parameters())
        assert trainer.rollout.version == 2
        # The engine's log-probs equal the trained actor's, also after an update.
        assert max(row["engine_gap/max"] for row in history) < 1e-4


def test_non_finite_weights_are_an_error(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(
        config_of(num_iterations=3), tiny_model, reward_model, checkpoints=checkpoints_every_step(tmp_path, "ppo")
    )
    save = trainer.checkpoints.save

    def save_and_break(step: int, *args: Any) -> None:
        save(step, *args)
        trainer.checkpoints.wait()
        with torch.no_grad():
            trainer.learner.models.actor.lm.model.norm.weight.fill_(math.nan)

    trainer.checkpoints.save = save_and_break  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"loss/policy is nan at step 2 \(epoch 0, minibatch 0, responses") as error:
        trainer.train(PROMPTS, [])
    assert f"the latest checkpoint is {tmp_path}/ppo/x/step-00000001" in str(error.value)


def test_huge_learning_rate_is_an_error(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(training={"learning_rate": 1e30})
    with pytest.raises(InputError, match="is (nan|inf) at step"):
        trainer_of(stage, tiny_model, reward_model).train(PROMPTS, [])


def test_non_finite_reward_names_its_prompt(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(), tiny_model, reward_model, reward=number_of(math.inf))
    with pytest.raises(InputError, match="The reward model scored the response .* to prompt 'prompt-[0-9]+' as inf"):
        trainer.train(PROMPTS, [])


def test_responses_of_fixed_length_are_all_truncated(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(sampling={"max_new_tokens": 4, "min_new_tokens": 4}, num_iterations=1)
    row = trainer_of(stage, tiny_model, reward_model).train(PROMPTS, [])[0]
    assert row["response/length"] == 4.0
    assert row["response/eos_rate"] == 0.0


def test_loading_twice_gives_independent_models(tiny_model: Path, reward_model: Path) -> None:
    a, b = (load(config_of(), tiny_model, reward_model)[0] for _ in range(2))
    assert a.actor.lm.model.norm is not b.actor.lm.model.norm


def test_each_rank_has_an_equal_share_of_every_minibatch() -> None:
    shares = []
    for rank in (0, 1):
        group = SingleProcess()
        group.rank, group.world_size = rank, 2
        shares.append(local_rows(12, 6, group))
    assert shares == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


class Collected(SingleProcess):
    """One rank of several, which knows what the others pass to gather()."""

    def __init__(self, rank: int, items: list[list[Any]]) -> None:
        self.rank, self.world_size, self.items = rank, len(items), items

    def gather(self, items: Any) -> list[Any]:
        assert list(items) == self.items[self.rank]
        return [item for part in self.items for item in part]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_every_minibatch_by_rows_and_by_tokens(world_size: int) -> None:
    minibatch, draw = 8, random.Random(1)
    lengths = [draw.randint(1, 300) for _ in range(16)]
    rollout = [completion([1], [2] * length, prompt=str(row)) for row, length in enumerate(lengths)]
    rows = [local_rows(16, minibatch, Collected(rank, [[]] * world_size)) for rank in range(world_size)]
    sampled = [[(row, rollout[row]) for row in own] for own in rows]
    shares = [
        share_rollout(rows[rank], [rollout[row] for row in rows[rank]], minibatch, Collected(rank, sampled))
        for rank in range(world_size)
    ]
    size = minibatch // world_size
    for start in range(0, 16 // world_size, size):
        parts = [share[start : start + size] for share in shares]
        first = start // size * minibatch  # each minibatch keeps its responses
        assert sorted(int(c.prompt.prompt) for part in parts for c in part) == list(range(first, first + minibatch))
        tokens = [sum(len(c.response_ids) for c in part) for part in parts]
        assert max(tokens) - min(tokens) <= max(lengths)
        assert all([len(c.response_ids) for c in part] == sorted(len(c.response_ids) for c in part) for part in parts)


def test_order_of_the_prompts_is_computed_once_an_epoch(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = batching.epoch_order
    monkeypatch.setattr(batching, "epoch_order", lambda *args, **at: calls.append(at["epoch"]) or plain(*args, **at))
    trainer = trainer_of(config_of(rollout={"num_prompts": 12}), tiny_model, reward_model)
    ids = [[p.id for p in trainer._prompts_of(iteration, PROMPTS)] for iteration in (1, 2)]
    assert calls == [0, 1, 2, 2, 3, 4]  # 5 prompts: positions 0 to 11 and 12 to 23
    stream = [id for iteration in ids for id in iteration]
    for epoch in range(4):
        assert sorted(stream[5 * epoch : 5 * epoch + 5]) == sorted(p.id for p in PROMPTS)
