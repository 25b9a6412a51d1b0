import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.ppo import trainer as trainer_module
from components.ppo import update as update_module
from components.ppo.experience import Experience, make_experience, plan_minibatches
from components.ppo.trainer import PpoTrainer
from components.ppo.update import _epoch_order, update
from components.rlhf.data.records import Completion
from components.rlhf.text.errors import NonFiniteError
from tests.support.ppo_runs import PROMPTS, completion, config_of, largest_gap, trainer_of, weights


def completions() -> list[Completion]:
    """Eight ragged responses of arbitrary tokens."""
    return [
        completion([5, 6, 7][: 1 + i % 3], list(range(10 * i + 1, 10 * i + 2 + (5 * i) % 6)), truncated=i % 2 == 0)
        for i in range(8)
    ]


def experience_of(trainer: PpoTrainer) -> Experience:
    return make_experience(trainer.learner, completions(), kl_coef=0.1)


def run(trainer: PpoTrainer, experience: Experience | None = None) -> dict[str, float]:
    return update(trainer.learner, experience or experience_of(trainer), seed=3, iteration=1)


# Experience and the first epoch use the same batch shapes, so in fp32 nothing differs.


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("microbatch_tokens", [1, 20, 4096])
def test_first_ratio_is_exactly_1(tiny_model: Path, reward_model: Path, frozen: int, microbatch_tokens: int) -> None:
    stage = config_of(
        frozen=frozen, minibatch=8, sampling={"temperature": 0.7}, training={"microbatch_tokens": microbatch_tokens}
    )
    row = run(trainer_of(stage, tiny_model, reward_model))
    assert row["actor/first_ratio_error"] == 0.0
    assert row["actor/approx_kl"] == 0.0
    assert row["actor/clip_fraction"] == 0.0
    assert row["actor/grad_norm"] > 0


@pytest.mark.parametrize("frozen", [0, 2])
def test_first_ratio_is_1_and_first_kl_is_0_in_the_training_loop(
    tiny_model: Path, reward_model: Path, frozen: int
) -> None:
    stage = config_of(frozen=frozen, minibatch=4, num_epochs=2, training={"microbatch_tokens": 30})
    first, second = trainer_of(stage, tiny_model, reward_model).train(PROMPTS, [])
    assert first["actor/first_ratio_error"] == 0.0
    assert first["kl/sequence"] == 0.0
    assert first["kl/token"] == 0.0
    assert first["actor/approx_kl"] != 0.0  # mean of all four steps, of which the later ones see an updated policy
    assert second["actor/first_ratio_error"] == 0.0  # the old policy is the one of the rollout
    assert second["kl/sequence"] != 0.0


@pytest.mark.parametrize("frozen", [0, 2])
def test_log_probs_of_the_engine_serve_as_old_ones_without_a_pass_of_the_actor(
    tiny_model: Path, reward_model: Path, frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config_of(frozen=frozen, old_logprobs="engine"), tiny_model, reward_model)
    actor = trainer.learner.models.actor
    passes = []
    plain = actor.forward
    monkeypatch.setattr(actor, "forward", lambda *args, **options: passes.append(1) or plain(*args, **options))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "update", lambda *_, **__: {})
        row = trainer._iterate(1, PROMPTS)
    assert len(passes) == 1  # of the probe after the sync
    assert "engine_gap/max" not in row
    assert row["entropy"] > 0
    row = trainer._iterate(2, PROMPTS)
    assert 0 < row["actor/first_ratio_error"] < 1e-3  # both engines are transformers, with other batches


def test_entropy_of_engine_log_probs_is_that_of_the_policy_on_average(tiny_model: Path, reward_model: Path) -> None:
    rows = {}
    for source in ("trainer", "engine"):
        stage = config_of(
            old_logprobs=source, rollout={"num_prompts": 256}, minibatch=256, sampling={"batch_size": 256}
        )
        rows[source] = trainer_of(stage, tiny_model, reward_model)._iterate(1, PROMPTS)
    assert rows["engine"]["entropy"] == pytest.approx(rows["trainer"]["entropy"], rel=0.03)
    assert rows["engine"]["kl/sequence"] == pytest.approx(0.0, abs=1e-3)


def test_first_ratio_is_not_1_when_the_old_policy_differs(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(minibatch=8), tiny_model, reward_model)
    e = experience_of(trainer)
    shifted = replace(e, old_logprobs=torch.where(e.batch.response_mask, e.old_logprobs - math.log(2), 0))
    row = run(trainer, shifted)
    assert row["actor/first_ratio_error"] == pytest.approx(1.0, abs=1e-4)  # twice as likely as it was
    assert row["actor/approx_kl"] == pytest.approx(-math.log(2), abs=1e-4)


@pytest.mark.parametrize(("minibatch", "epochs", "steps"), [(8, 1, 1), (4, 1, 2), (4, 3, 6), (1, 1, 8)])
@pytest.mark.parametrize("microbatch_tokens", [20, 4096])
def test_one_optimizer_step_per_minibatch_and_epoch(
    tiny_model: Path, reward_model: Path, minibatch: int, epochs: int, steps: int, microbatch_tokens: int
) -> None:
    stage = config_of(minibatch=minibatch, num_epochs=epochs, training={"microbatch_tokens": microbatch_tokens})
    trainer = trainer_of(stage, tiny_model, reward_model)
    run(trainer)
    assert [engine.steps_done for engine in trainer.learner.engines.values()] == [steps, steps]


def test_every_epoch_takes_each_response_once(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(
        config_of(minibatch=4, num_epochs=2, training={"microbatch_tokens": 20}), tiny_model, reward_model
    )
    seen: list[list[int]] = []
    plain = update_module._optimizer_step

    def recording(*args: Any, **options: Any) -> dict[str, float]:
        seen.append(sorted(torch.cat(args[2]).tolist()))
        return plain(*args, **options)

    monkeypatch.setattr(update_module, "_optimizer_step", recording)
    run(trainer)
    assert seen[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # the order in which the old log-probs were computed
    assert sorted(seen[2] + seen[3]) == list(range(8))
    assert seen[2] + seen[3] != list(range(8))


def test_epoch_order_depends_on_seed_iteration_and_epoch() -> None:
    orders = [
        _epoch_order(32, seed=seed, iteration=iteration, epoch=epoch)
        for seed, iteration, epoch in ((1, 2, 1), (2, 2, 1), (1, 3, 1), (1, 2, 2))
    ]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert _epoch_order(32, seed=1, iteration=2, epoch=1) == orders[0]


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_microbatches_do_not_change_the_update(tiny_model: Path, reward_model: Path, aggregation: str) -> None:
    runs, rows = [], []
    for tokens in (4096, 30, 1):
        training = {"microbatch_tokens": tokens, "learning_rate": 1e-4}
        stage = config_of(
            frozen=1, minibatch=8, loss_aggregation=aggregation, training=training, critic={"learning_rate": 1e-4}
        )
        trainer = trainer_of(stage, tiny_model, reward_model)
        start = weights(trainer)
        rows.append(run(trainer))
        runs.append(weights(trainer))
    moved = largest_gap(runs[0], start)
    for row, found in zip(rows[1:], runs[1:], strict=True):
        assert row == pytest.approx(rows[0], rel=1e-3, abs=1e-5)
        # Adam normalizes by the gradient's size, so a gradient that is only rounding may flip its sign.
        assert largest_gap(found, runs[0]) < 0.05 * moved


def test_shared_trunk_gives_the_same_update_as_separate_models(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = config_of(frozen=2, minibatch=4, num_epochs=2)
    shared = trainer_of(stage, tiny_model, reward_model)
    unshared = trainer_of(stage, tiny_model, reward_model)
    models = replace(unshared.learner.models, shared_trunk=False)
    unshared.learner = replace(unshared.learner, models=models)
    e = experience_of(shared)
    assert e.states is not None
    assert experience_of(unshared).states is None
    rows = [run(shared, e), run(unshared)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-6)
    assert largest_gap(weights(shared), weights(unshared)) < 1e-4


def test_critic_head_is_trained_on_the_features_of_the_rollout(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config_of(frozen=1, critic={"trains": "head"}), tiny_model, reward_model)
    e = experience_of(trainer)
    assert e.features is not None
    before = weights(trainer)

    def never(*_: Any) -> None:
        raise AssertionError("the layers below the head ran again")

    monkeypatch.setattr(trainer.learner.models.critic, "features", never)
    row = run(trainer, e)
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert {name for name in moved if name.startswith("critic.")} == {"critic.lm.score.weight"}
    assert row["critic/grad_norm"] > 0


def test_update_leaves_reward_model_and_reference_unchanged(tiny_model: Path, reward_model: Path) -> None:
    for trains in ("layers", "head"):
        trainer = trainer_of(config_of(frozen=1, critic={"trains": trains}), tiny_model, reward_model)
        kept = [trainer.learner.models.reward_model, trainer.learner.models.reference]
        before = [[p.clone() for p in module.parameters()] for module in kept]
        run(trainer)
        for module, was in zip(kept, before, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(module.parameters(), was, strict=True))


# Many epochs on one rollout, without clipping.


def test_update_raises_the_probability_of_good_responses(tiny_model: Path, reward_model: Path) -> None:
    training = {"learning_rate": 3e-3, "max_grad_norm": 0.0}
    stage = config_of(minibatch=8, num_epochs=20, clip_range=1.0, training=training)
    trainer = trainer_of(stage, tiny_model, reward_model)
    e = experience_of(trainer)
    run(trainer, e)
    mask = e.batch.response_mask
    change = (experience_of(trainer).old_logprobs - e.old_logprobs)[mask]
    assert torch.corrcoef(torch.stack([change, e.advantages[mask]]))[0, 1] > 0.5


@pytest.mark.parametrize("trains", ["layers", "head"])
def test_update_moves_values_towards_returns(tiny_model: Path, reward_model: Path, trains: str) -> None:
    critic = {"trains": trains, "learning_rate": {"layers": 3e-3, "head": 3e-2}[trains]}
    stage = config_of(minibatch=8, num_epochs=20, value_clip_range=None, critic=critic)
    trainer = trainer_of(stage, tiny_model, reward_model)
    e = experience_of(trainer)
    run(trainer, e)
    mask = e.batch.response_mask
    values = [e.old_values, experience_of(trainer).old_values]
    before, after = ((v - e.returns)[mask].square().mean().item() for v in values)
    assert after < 0.5 * before


@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_non_finite_loss_names_the_minibatch_and_changes_no_weight(
    tiny_model: Path, reward_model: Path, name: str
) -> None:
    trainer = trainer_of(config_of(minibatch=8), tiny_model, reward_model)
    e = experience_of(trainer)
    bad = getattr(e, name).clone()
    bad[6, 0] = math.nan
    stage_before = weights(trainer)
    what = {"advantages": "loss/policy", "returns": "loss/value"}[name]
    with pytest.raises(NonFiniteError, match=f"{what} is nan at step 1 \\(epoch 0, minibatch 0, responses") as error:
        run(trainer, replace(e, **{name: bad}))
    assert "[0, 1, 2, 3, 4, 5, 6, 7]" in str(error.value)
    model = {"advantages": "actor", "returns": "critic"}[name]
    after = weights(trainer)
    assert all(torch.equal(after[key], stage_before[key]) for key in after if key.startswith(model))


def test_non_finite_loss_names_the_second_minibatch(tiny_model: Path, reward_model: Path) -> None:
    trainer = trainer_of(config_of(minibatch=4, training={"microbatch_tokens": 20}), tiny_model, reward_model)
    e = experience_of(trainer)
    bad = e.advantages.clone()
    bad[6, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"epoch 0, minibatch 1, responses \[4, 5, 6, 7\]"):
        run(trainer, replace(e, advantages=bad))


# The rollout engine's log-probs are -1 everywhere; the actor's are far lower.


def test_importance_clip_weights_the_loss_and_is_logged(
    tiny_model: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    plain = update_module.policy_loss

    def recording(*args: Any, **options: Any) -> Any:
        given.append(options["weights"])
        return plain(*args, **options)

    monkeypatch.setattr(update_module, "policy_loss", recording)
    stage = config_of(importance_clip=(0.01, 2.0), minibatch=4, num_epochs=2)
    trainer = trainer_of(stage, tiny_model, reward_model)
    e = experience_of(trainer)
    row = run(trainer, e)
    mask = e.batch.response_mask
    ratio = (e.old_logprobs - e.engine_logprobs)[mask].exp()
    assert row["importance/mean"] == pytest.approx(ratio.clamp(0.01, 2.0).mean().item())
    assert row["importance/clipped"] == ((ratio < 0.01) | (ratio > 2.0)).float().mean().item()
    assert 0 < row["importance/clipped"] < 1
    expected = torch.where(mask, (e.old_logprobs + mask.float()).exp().clamp(0.01, 2.0), 1)
    # The same weights in both epochs, in the order of each.
    second = plan_minibatches(_epoch_order(8, seed=3, iteration=1, epoch=1), e.batch, trainer.learner)
    passes = [rows for minibatches in (e.minibatches, second) for minibatch in minibatches for rows in minibatch]
    assert len(given) == len(passes)
    for found, rows in zip(given, passes, strict=True):
        width = e.batch.response_lengths[rows].max()
        assert torch.equal(found, expected[rows, :width])


def test_importance_clip_changes_nothing_when_engines_agree(tiny_model: Path, reward_model: Path) -> None:
    rows, ends = [], []
    for clip in (None, (0.5, 5.0)):
        trainer = trainer_of(config_of(importance_clip=clip), tiny_model, reward_model)
        e = experience_of(trainer)
        rows.append(run(trainer, replace(e, engine_logprobs=e.old_logprobs)))
        ends.append(weights(trainer))
    assert largest_gap(*ends) == 0.0
    assert rows[1] == rows[0] | {"importance/mean": 1.0, "importance/clipped": 0.0}
