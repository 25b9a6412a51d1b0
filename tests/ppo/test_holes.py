"""Responses of several turns: tokens of the environment are seen by attention and by nothing else."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from components.ppo.experience import Experience, make_experience
from components.ppo.metrics import rollout_metrics
from components.ppo.trainer import PpoTrainer
from components.ppo.update import update
from components.rlhf.data.records import Completion
from components.rlhf.maths.losses import Aggregation, PolicyRatio
from components.rlhf.models import actor as actor_module
from components.rlhf.models import scalar as scalar_module
from tests.support.ppo_runs import completion, config_of, largest_gap, trainer_of, weights

SIZES = [(3, 9, "1110001111"), (1, 6, "101101"), (5, 4, "1111"), (2, 8, "11001001"), (4, 5, "10001"), (1, 1, "1")]


def completions() -> list[Completion]:
    """Six ragged responses of one to three turns, of arbitrary tokens."""
    found = []
    for row, (prompt, _, mask) in enumerate(SIZES):
        ids = [(37 * row + 11 * t) % 200 + 3 for t in range(prompt + len(mask))]
        flags = [flag == "1" for flag in mask]
        one = completion(ids[:prompt], ids[prompt:], truncated=row % 2 == 0)
        logprobs = torch.where(torch.tensor(flags), one.logprobs, 0) if one.logprobs is not None else None
        found.append(replace(one, response_mask=flags, logprobs=logprobs))
    return found


def trainer(sft: Path, reward_model: Path | None, **options: Any) -> PpoTrainer:
    stage = config_of(**({"rollout": {"num_prompts": 6}, "minibatch": 6} | options))
    made = trainer_of(stage, sft, reward_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as after some updates
        for model in (made.learner.models.actor, made.learner.models.critic):
            for parameter in () if model is None else model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return made


@dataclass
class Passes:
    """The final hidden states of every forward pass with gradients, and the sequences that they are of."""

    inputs: list[Tensor]
    hidden: list[Tensor]

    def watch(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run_rows(model: Any, input_ids: Tensor, lengths: Tensor, **options: Any) -> Any:
            output = plain(model, input_ids, lengths, **options)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is not None and hidden.requires_grad:
                hidden.retain_grad()
                self.inputs.append(input_ids)
                self.hidden.append(hidden)
            return output

        return run_rows


def assert_only_model_tokens_have_gradients(passes: Passes, rows: list[Completion]) -> int:
    """The number of sequences that have been compared."""
    by_ids = {tuple(c.prompt_ids + c.response_ids): c for c in rows}
    count = 0
    for ids, hidden in zip(passes.inputs, passes.hidden, strict=True):
        assert hidden.grad is not None
        for sequence, grad in zip(ids.tolist(), hidden.grad, strict=True):
            row = next(c for key, c in by_ids.items() if tuple(sequence[: len(key)]) == key)
            assert row.response_mask is not None
            before = len(row.prompt_ids) - 1  # the state before the first token
            has_gradient = grad.abs().amax(dim=-1) > 0
            expected = [False] * len(sequence)
            expected[before : before + len(row.response_mask)] = row.response_mask
            assert has_gradient.tolist() == expected
            count += 1
    return count


AGGREGATIONS = [{"loss_aggregation": name} for name in get_args(Aggregation)]
RATIOS = [{"policy_ratio": name} for name in get_args(PolicyRatio)[1:]]
PATHS = [
    {"training": {"microbatch_tokens": 1}},
    {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1},
    {"old_logprobs": "engine", "clip_range": 1.0},
    {"importance_clip": (0.1, 9.0), "importance_mode": "sequence-truncate"},
]


@pytest.mark.parametrize("options", [*AGGREGATIONS, *RATIOS, *PATHS], ids=str)
@pytest.mark.parametrize(("frozen", "packs"), [(0, False), (0, True), (2, True)])
def test_tokens_of_the_environment_have_gradients_of_exactly_0(
    tiny_model: Path, reward_model: Path, options: Any, frozen: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tiny_model, reward_model, frozen=frozen, **options)
    models = made.learner.models
    for model in (models.actor, models.reference, models.critic, models.reward_model):
        assert model is not None and model.pack_limit > 100
        model.pack_limit = model.pack_limit if packs else 0
    e = make_experience(made.learner, completions(), kl_coef=0.1)
    passes = Passes(inputs=[], hidden=[])
    for module in (actor_module, scalar_module):
        monkeypatch.setattr(module, "run_rows", passes.watch(module.run_rows))
    update(made.learner, e, seed=0, iteration=1)
    assert assert_only_model_tokens_have_gradients(passes, completions()) == 12  # of actor and critic


def spoiled(e: Experience) -> Experience:
    """The experience with other numbers at tokens of the environment."""
    mask = e.batch.response_mask

    def spoil(x: Tensor) -> Tensor:
        return torch.where(mask, x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 5)

    names = ("old_logprobs", "ref_logprobs", "engine_logprobs", "advantages", "returns")
    assert e.old_values is not None
    return replace(e, old_values=spoil(e.old_values), **{name: spoil(getattr(e, name)) for name in names})


@pytest.mark.parametrize("trains", ["layers", "head"])
def test_numbers_at_tokens_of_the_environment_change_no_weight(
    tiny_model: Path, reward_model: Path, trains: str
) -> None:
    found = []
    for change in (lambda e: e, spoiled):
        made = trainer(tiny_model, reward_model, frozen=1, num_epochs=2, critic={"trains": trains})
        before = weights(made)
        e = make_experience(made.learner, completions(), kl_coef=0.1)
        update(made.learner, change(e), seed=0, iteration=1)
        found.append(weights(made))
        assert largest_gap(before, found[-1]) > 1e-4
    assert largest_gap(*found) == 0.0


def test_experience_equals_a_loop_over_the_tokens_of_the_model(tiny_model: Path, reward_model: Path) -> None:
    made = trainer(tiny_model, reward_model, gamma=0.9, gae_lambda=0.8, whiten_advantages=False)
    models = made.learner.models
    e = make_experience(made.learner, completions(), kl_coef=0.3)
    assert models.critic is not None
    for row, c in enumerate(completions()):
        ids, start = torch.tensor([c.prompt_ids + c.response_ids]), len(c.prompt_ids)
        own = [t for t, flag in enumerate(c.response_mask or []) if flag]
        logprobs, values = {}, []
        with torch.no_grad():
            for name, actor in (("actor", models.actor), ("reference", models.reference)):
                logits = [actor.lm(ids[:, : start + t]).logits[0, -1] for t in own]  # attention sees all that is before
                logprobs[name] = [
                    torch.log_softmax(x, -1)[c.response_ids[t]].item() for x, t in zip(logits, own, strict=True)
                ]
            for t in own:
                hidden = models.critic.lm.model(ids[:, : start + t]).last_hidden_state[0, -1]
                values.append((float(hidden @ models.critic.lm.score.weight[0]) - 0.2) / 1.5)
        kl = [a - b for a, b in zip(logprobs["actor"], logprobs["reference"], strict=True)]
        rewards = [-0.3 * value for value in kl]
        rewards[-1] += e.rewards[row].item()
        later = advantage = 0.0
        advantages = []
        for value, reward in zip(reversed(values), reversed(rewards), strict=True):
            advantage = reward + 0.9 * later - value + 0.9 * 0.8 * advantage
            later = value
            advantages.insert(0, advantage)
        assert e.old_values is not None
        for got, slow in (
            (e.old_logprobs, logprobs["actor"]),
            (e.kl, kl),
            (e.old_values, values),
            (e.advantages, advantages),
            (e.returns, [a + v for a, v in zip(advantages, values, strict=True)]),
        ):
            assert got[row, own].tolist() == pytest.approx(slow, abs=1e-3)
            assert not got[row][~e.batch.response_mask[row]].any()
    metrics = rollout_metrics(e)
    assert metrics["response/length"] == pytest.approx(sum(mask.count("1") for *_, mask in SIZES) / 6)
    assert metrics["kl/sequence"] == pytest.approx(e.kl.sum().item() / 6)


@pytest.mark.parametrize("advantage", ["gae", "rloo", "group_norm", "reinforce++", "reinforce++-baseline", "remax"])
def test_failed_response_teaches_nothing_and_moves_no_statistic(
    tiny_model: Path, reward_model: Path, advantage: str
) -> None:
    """The others learn as if it had another reward and other tokens."""
    found, metrics, kept = [], [], torch.tensor([0, 1, 2, 4, 5])
    for score in (1.0, 99.0):
        made = trainer(
            tiny_model,
            reward_model,
            advantage=advantage,
            reward_clip=None,
            rollout={"num_prompts": 2, "samples_per_prompt": 3} if advantage != "gae" else {"num_prompts": 6},
        )
        made.learner.models.reward_model.mean -= score  # type: ignore[union-attr]
        rows = completions()
        rows[3] = replace(rows[3], failure="timed out", response_ids=[9] * 8 if score > 1 else rows[3].response_ids)
        scorer = made.learner.rewards.scorers["reward_model"]
        plain = scorer.score
        fixed = torch.tensor([0.5, -1.0, 2.0, score, 0.7, 0.1])
        scorer.score = lambda *a, plain=plain, fixed=fixed, **k: fixed + 0 * plain(*a, **k)  # type: ignore[method-assign]
        e = make_experience(made.learner, rows, kl_coef=0.1, group_size=3)
        assert e.failed.tolist() == [False] * 3 + [True] + [False] * 2
        assert not e.loss_mask[3].any() and e.loss_mask[kept].any(dim=1).all()
        found.append(e.advantages[kept])
        metrics.append({k: v for k, v in rollout_metrics(e).items() if not k.startswith("tokens/")})
    assert torch.equal(*found)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    assert all(math.isfinite(value) for value in metrics[0].values())
    assert metrics[0]["score/mean"] == pytest.approx((0.5 - 1 + 2 + 0.7 + 0.1) / 5)
