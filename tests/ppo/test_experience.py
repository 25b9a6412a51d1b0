import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components.ppo.experience import Experience, Learner, Models, make_experience, plan_minibatches
from components.ppo.metrics import rollout_metrics
from components.rlhf.data.batching import collate
from components.rlhf.data.records import Completion
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.text.errors import NonFiniteError
from tests.support.ppo_runs import RewardFunction, completion, config_of, load, rewards_of

DISTRIBUTION = SamplingDistribution(temperature=0.8, min_new_tokens=1, stop_ids=(0,))
COMPLETIONS = [
    completion([5, 6, 7], [3, 4, 0]),
    completion([8], [1, 2, 9, 10, 11, 12], truncated=True),
    completion([9, 0, 11, 12, 13], [7]),  # an EOS inside a prompt is an ordinary token
    completion([40, 41], [20, 21, 22, 23], truncated=True),
]


@torch.no_grad()
def trained(models: Models) -> Models:
    """Like after some updates: the actor is different from the reference, and the critic from the reward model."""
    generator = torch.Generator().manual_seed(0)
    for module in (models.actor, models.critic):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return models


def experience_of(
    models: Models, completions: list[Completion] | None = None, *, kl_coef: float = 0.1, **ppo: Any
) -> Experience:
    settings = config_of(**ppo).ppo
    learner = Learner(models=models, rewards=rewards_of(models), config=settings, distribution=DISTRIBUTION)
    return make_experience(learner, completions or COMPLETIONS, kl_coef=kl_coef)


class Slow:
    """The experience of one response, token by token, in plain Python floats."""

    def __init__(self, models: Models, c: Completion, *, kl_coef: float, penalty: float, clip: float) -> None:
        ids, start, n = torch.tensor([c.prompt_ids + c.response_ids]), len(c.prompt_ids), len(c.response_ids)
        with torch.no_grad():
            self.old, self.entropy = self.logprobs(models.actor.lm, ids, start)
            self.ref, _ = self.logprobs(models.reference.lm, ids, start)
            self.values = [self.scalar(models.critic, ids[:, : start + t]) for t in range(n)]
            self.score = self.scalar(models.reward_model, ids)
        self.kl = [a - b for a, b in zip(self.old, self.ref, strict=True)]
        rewards = [-kl_coef * kl for kl in self.kl]
        rewards[-1] += min(max(self.score - (penalty if c.truncated else 0.0), -clip), clip)
        self.advantages = [0.0] * n
        for t in reversed(range(n)):
            later = self.values[t + 1] if t + 1 < n else 0.0
            delta = rewards[t] + 0.9 * later - self.values[t]
            self.advantages[t] = delta + (0.9 * 0.8 * self.advantages[t + 1] if t + 1 < n else 0.0)
        self.returns = [a + v for a, v in zip(self.advantages, self.values, strict=True)]

    def logprobs(self, lm: Any, ids: torch.Tensor, start: int) -> tuple[list[float], list[float]]:
        found, entropies = [], []
        for t, token in enumerate(ids[0, start:].tolist()):
            logits = lm(ids[:, : start + t]).logits[0, -1].double()
            if t < 1:
                logits[0] = -1e30  # the only stop id cannot be the first token
            p = torch.log_softmax(logits / 0.8, dim=-1)
            found.append(p[token].item())
            entropies.append(-(p.exp() * p).sum().item())
        return found, entropies

    def scalar(self, model: Any, ids: torch.Tensor) -> float:
        hidden = model.lm.model(ids).last_hidden_state[0, -1]
        return (float(hidden @ model.lm.score.weight[0]) - 0.2) / 1.5


@pytest.mark.parametrize("frozen", [0, 2], ids=["unshared", "shared"])
@pytest.mark.parametrize("trains", ["layers", "head"])
def test_experience_equals_a_loop_over_tokens(tiny_model: Path, reward_model: Path, frozen: int, trains: str) -> None:
    options: dict[str, Any] = {"frozen": frozen, "critic": {"trains": trains}}
    models = trained(load(config_of(**options), tiny_model, reward_model)[0])
    assert models.shared_trunk == (frozen > 0)
    e = experience_of(
        models, kl_coef=0.3, missing_eos_penalty=0.7, reward_clip=0.9, gamma=0.9, gae_lambda=0.8, **options
    )
    slow = [Slow(models, c, kl_coef=0.3, penalty=0.7, clip=0.9) for c in COMPLETIONS]
    assert any(abs(s.score) > 0.9 for s in slow)  # the clip has an effect
    every = [a for s in slow for a in s.advantages]
    mean = sum(every) / len(every)
    spread = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every))
    for row, s in enumerate(slow):
        n = len(s.old)
        assert e.scores[row].item() == pytest.approx(s.score, abs=1e-4)  # without penalty and clip
        for got, expected in (
            (e.old_logprobs, s.old),
            (e.ref_logprobs, s.ref),
            (e.kl, s.kl),
            (e.entropy, s.entropy),
            (e.old_values, s.values),
            (e.returns, s.returns),
            (e.advantages, [(a - mean) / spread for a in s.advantages]),
        ):
            assert got[row, :n].tolist() == pytest.approx(expected, abs=1e-3)
            assert not got[row, n:].any()
        expected_reward = min(max(s.score - (0.7 if COMPLETIONS[row].truncated else 0.0), -0.9), 0.9)
        assert e.rewards[row].item() == pytest.approx(expected_reward, abs=1e-4)
    assert e.truncated.tolist() == [False, True, False, True]
    assert max(abs(x) for s in slow for x in s.kl) > 0.05


def test_advantages_are_not_whitened_when_whitening_is_off(tiny_model: Path, reward_model: Path) -> None:
    models = trained(load(config_of(), tiny_model, reward_model)[0])
    e = experience_of(models, gamma=0.9, gae_lambda=0.8, whiten_advantages=False)
    slow = [Slow(models, c, kl_coef=0.1, penalty=0.0, clip=10.0) for c in COMPLETIONS]
    for row, s in enumerate(slow):
        assert e.advantages[row, : len(s.old)].tolist() == pytest.approx(s.advantages, abs=1e-3)


# Returns with gamma 1, lambda 1 and no KL are the shaped score of the response.


def returns(tiny_model: Path, reward_model: Path, score: float, **ppo: Any) -> list[float]:
    models = load(config_of(), tiny_model, reward_model)[0]
    models = replace(models, scorer=RewardFunction(lambda _prompt, _response: score))
    e = experience_of(models, kl_coef=0.0, gamma=1.0, gae_lambda=1.0, **ppo)
    assert e.scores.tolist() == [score] * 4  # scores are logged before penalty and clip
    mask = e.batch.response_mask
    return [e.returns[row, 0].item() for row in range(len(mask))]


def test_truncated_response_pays_the_missing_eos_penalty(tiny_model: Path, reward_model: Path) -> None:
    found = returns(tiny_model, reward_model, 2.0, missing_eos_penalty=0.5)
    assert found == pytest.approx([2.0, 1.5, 2.0, 1.5], abs=1e-5)


def test_missing_eos_penalty_is_applied_before_the_clip(tiny_model: Path, reward_model: Path) -> None:
    found = returns(tiny_model, reward_model, 3.0, missing_eos_penalty=2.5, reward_clip=1.0)
    assert found == pytest.approx([1.0, 0.5, 1.0, 0.5], abs=1e-5)  # after it, it would be 1 - 2.5
    found = returns(tiny_model, reward_model, 3.0, missing_eos_penalty=9.0, reward_clip=1.0)
    assert found == pytest.approx([1.0, -1.0, 1.0, -1.0], abs=1e-5)


def test_scores_are_unclipped_without_reward_clip(tiny_model: Path, reward_model: Path) -> None:
    found = returns(tiny_model, reward_model, 50.0, reward_clip=None)
    assert found == pytest.approx([50.0] * 4, abs=1e-4)


def test_kl_penalty_is_not_clipped(tiny_model: Path, reward_model: Path) -> None:
    models = trained(load(config_of(), tiny_model, reward_model)[0])
    models = replace(models, scorer=RewardFunction(lambda _prompt, _response: 0.0))
    options: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0}
    wide = experience_of(models, kl_coef=1.0, reward_clip=10.0, **options)
    tight = experience_of(models, kl_coef=1.0, reward_clip=1e-6, **options)
    assert torch.allclose(wide.returns, tight.returns, atol=1e-5)
    assert torch.allclose(wide.returns[:, 0], -wide.kl.sum(dim=1), atol=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimator_changes_only_the_penalty(tiny_model: Path, reward_model: Path, estimator: str) -> None:
    models = trained(load(config_of(), tiny_model, reward_model)[0])
    models = replace(models, scorer=RewardFunction(lambda _prompt, _response: 0.0))
    e = experience_of(models, kl_coef=1.0, kl_estimator=estimator, gamma=1.0, gae_lambda=1.0)
    d = e.old_logprobs - e.ref_logprobs
    penalty = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
    assert torch.allclose(e.returns[:, 0], -penalty.sum(dim=1), atol=1e-4)
    assert torch.equal(e.kl, d)  # what is logged is always the log-ratio


@pytest.mark.parametrize("tokens", [1, 14, 20, 10_000])
def test_microbatches_do_not_change_experience(tiny_model: Path, reward_model: Path, tokens: int) -> None:
    models = trained(load(config_of(frozen=1), tiny_model, reward_model)[0])
    whole = experience_of(models, frozen=1, training={"microbatch_tokens": 10_000})
    parts = experience_of(models, frozen=1, training={"microbatch_tokens": tokens})
    for name in (
        "old_logprobs",
        "ref_logprobs",
        "old_values",
        "scores",
        "entropy",
        "advantages",
        "returns",
    ):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-4), name
    assert parts.states is not None and whole.states is not None
    assert torch.allclose(parts.states.values, whole.states.values, atol=1e-4)


@pytest.mark.parametrize(
    ("limits", "minibatch", "tokens", "expected"),
    [
        ((999, 999), 6, 9999, [[[0, 2, 4, 5, 1, 3]]]),
        ((999, 999), 3, 9999, [[[0, 2, 1]], [[4, 5, 3]]]),
        ((999, 999), 6, 230, [[[0, 2, 4, 5, 1], [3]]]),
        ((999, 0), 6, 9999, [[[0, 2, 4, 5], [1, 3]]]),  # one of the models cannot pack: rows of similar length
        ((0, 0), 3, 9999, [[[0, 2], [1]], [[4, 5], [3]]]),
        ((0, 0), 6, 1, [[[0], [2], [4], [5], [1], [3]]]),
        ((999, 100), 6, 9999, [[[0, 2, 4, 5], [1, 3]]]),  # one cannot pack long rows
    ],
)
def test_minibatches_are_cut_in_order_and_split_into_passes(
    limits: tuple[int, int], minibatch: int, tokens: int, expected: list[list[list[int]]]
) -> None:
    lengths = [5, 200, 6, 210, 7, 8]
    batch = collate([[1]] * 6, [[2] * (length - 1) for length in lengths])
    first, second = (SimpleNamespace(pack_limit=limit) for limit in limits)
    models = SimpleNamespace(actor=first, reference=first, critic=second, reward_model=second)
    config = config_of(minibatch=minibatch, training={"microbatch_tokens": tokens}, rollout={"num_prompts": 6}).ppo
    learner = SimpleNamespace(models=models, config=config, group=SINGLE_PROCESS)
    found = plan_minibatches(range(6), batch, learner)  # type: ignore[arg-type]
    assert [[rows.tolist() for rows in passes] for passes in found] == expected


def test_shared_trunk_gives_the_same_experience_as_separate_models(tiny_model: Path, reward_model: Path) -> None:
    found = []
    for frozen in (0, 2):
        e = experience_of(load(config_of(frozen=frozen), tiny_model, reward_model)[0], frozen=frozen)
        assert (e.states is not None) == (frozen > 0)
        found.append(e)
    for name in ("old_logprobs", "ref_logprobs", "old_values", "scores", "entropy", "advantages", "returns", "kl"):
        assert torch.allclose(getattr(found[0], name), getattr(found[1], name), atol=1e-5), name


def test_non_finite_score_names_its_prompt(tiny_model: Path, reward_model: Path) -> None:
    models = load(config_of(), tiny_model, reward_model)[0]
    models = replace(models, scorer=RewardFunction(lambda _prompt, response: math.nan if len(response) == 4 else 1.0))
    unnamed = [*COMPLETIONS[:3], completion([40, 41], [20, 21, 22, 23], prompt="what they asked")]
    with pytest.raises(
        NonFiniteError, match="scored the response 'a response' to prompt 'what they asked' as nan"
    ) as error:
        experience_of(models, unnamed)
    assert "(1 of 4 scores are not finite)" in str(error.value)
    named = replace(unnamed[3], prompt=replace(unnamed[3].prompt, id="prompt-17"))
    with pytest.raises(NonFiniteError, match="to prompt 'prompt-17'"):
        experience_of(models, [*unnamed[:3], named])


def by_hand() -> Experience:
    batch = collate([[1], [1]], [[2, 3, 4], [5]])
    mask = batch.response_mask
    zeros = torch.zeros(2, 3)
    return Experience(
        batch=batch,
        old_logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]]),
        ref_logprobs=zeros,
        engine_logprobs=torch.tensor([[-1.0, -2.5, -3.0], [-0.25, 9.0, 9.0]]),
        old_values=torch.where(mask, torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0]]), 0),
        scores=torch.tensor([3.0, -1.0]),
        reward_parts={"reward_model": torch.tensor([3.0, -1.0])},
        rewards=torch.tensor([3.0, -1.0]),
        kl=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]]),
        entropy=torch.tensor([[1.0, 1.0, 2.0], [4.0, 0.0, 0.0]]),
        advantages=zeros,
        returns=torch.tensor([[1.0, 2.0, 3.0], [8.0, 0.0, 0.0]]),
        loss_mask=mask,
        equal_groups=None,
        kl_coef=0.1,
        truncated=torch.tensor([True, False]),
        failed=torch.tensor([False, False]),
        clipped=torch.tensor([True, False]),
        states=None,
        features=None,
        pack_limit=0,
        minibatches=[[torch.arange(2)]],
    )


def test_rollout_metrics_of_a_hand_computed_example() -> None:
    # Returns 1, 2, 3, 8 have variance 29/4; the errors 0, 0, 0, 4 have variance 3.
    expected = {
        "score/mean": 1.0,
        "score/std": 2.0,
        "score/mean_ended": -1.0,
        "reward/mean": 1.0,
        "score/clipped_fraction": 0.5,
        "kl/sequence": 0.5,
        "kl/token": 0.25,
        "entropy": 2.0,
        "response/length": 2.0,
        "response/eos_rate": 0.5,
        "response/left_out": 0.0,
        "value/mean": 2.5,
        "value/explained_variance": 1 - 3 / 7.25,
        "engine_gap/mean": 0.75 / 4,
        "engine_gap/max": 0.5,
        "tokens/computed_per_real": 8 / 6,  # two rows of 4 and 2 tokens in one pass
    }
    assert rollout_metrics(by_hand()) == pytest.approx(expected)


def test_rows_that_do_not_count_change_no_mean() -> None:
    first = rollout_metrics(by_hand(), counted=torch.tensor([True, False]))
    expected = {
        "score/mean": 3.0,
        "score/std": 0.0,
        "score/mean_ended": 0.0,
        "reward/mean": 3.0,
        "score/clipped_fraction": 1.0,
        "kl/sequence": 0.6,
        "kl/token": 0.2,
        "entropy": 4 / 3,
        "response/length": 3.0,
        "response/eos_rate": 0.0,
        "response/left_out": 0.0,
        "value/mean": 2.0,
        "value/explained_variance": 1.0,
        "engine_gap/mean": 0.5 / 3,
        "engine_gap/max": 0.5,
        "tokens/computed_per_real": 8 / 6,
    }
    assert first == pytest.approx(expected, abs=1e-6)
    assert rollout_metrics(by_hand(), counted=torch.tensor([False, True]))["engine_gap/max"] == 0.25


def test_rollout_metrics_are_finite_when_no_response_ended_and_returns_are_constant() -> None:
    e = replace(by_hand(), truncated=torch.tensor([True, True]), returns=torch.zeros(2, 3))
    found = rollout_metrics(e)
    assert found["score/mean_ended"] == 0.0
    assert found["value/explained_variance"] == 0.0
    assert all(math.isfinite(value) for value in found.values())


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one() -> None:
    e = by_hand()
    for values, expected in ((e.returns, 1.0), (torch.full((2, 3), 7.0), 0.0)):
        found = rollout_metrics(replace(e, old_values=values))["value/explained_variance"]
        assert found == pytest.approx(expected, abs=1e-6)
