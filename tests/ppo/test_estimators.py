"""Advantage estimators without a critic, and what is left out of the losses."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from components.ppo import update as update_module
from components.ppo.experience import Experience, Learner, make_experience
from components.ppo.metrics import final_metrics, rollout_metrics
from components.ppo.ptx import DemonstrationLoss
from components.ppo.trainer import PpoTrainer, local_rows, share_rollout
from components.ppo.update import update
from components.rlhf.config.ppo import GROUP_ESTIMATORS, PpoConfig
from components.rlhf.data.batching import epoch_order
from components.rlhf.data.records import Completion, Demonstration, Turn
from components.rlhf.data.token_files import encode_all
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.actor import SamplingDistribution
from tests.support.ppo_runs import (
    PROMPTS,
    VALIDATION,
    RewardFunction,
    completion,
    config_of,
    largest_gap,
    load,
    rewards_of,
    share_of_low_ids,
    trainer_of,
    weights,
    without_times,
)
from tests.support.training import checkpoints_every_step

CRITIC_FREE = ("reinforce++", "reinforce++-baseline", "rloo", "group_norm", "dr_grpo", "remax")
# Two prompts with three responses each; the rewards of the first group differ, those of the second do not.
COMPLETIONS = [
    completion([5, 6], [3, 4, 0]),
    completion([5, 6], [1, 2, 9, 10, 11, 12], truncated=True),
    completion([5, 6], [7]),
    completion([9, 0, 11], [20, 21], truncated=True),
    completion([9, 0, 11], [22, 0]),
    completion([9, 0, 11], [23, 24, 25, 0]),
]
DEMONSTRATIONS = [
    Demonstration(turns=(Turn(context="It" + " was" * number, answer=" good" * (1 + 2 * number)),))
    for number in range(5)
]
SCORES = {3: 1.0, 1: 4.0, 7: -2.0, 20: 0.5, 22: 0.5, 23: 0.5}  # by the first token of the response


def options_of(advantage: str, **options: Any) -> dict[str, Any]:
    group = advantage in GROUP_ESTIMATORS
    rollout = {"num_prompts": 2, "samples_per_prompt": 3} if group else {"num_prompts": 6}
    return {"advantage": advantage, "minibatch": 6, "rollout": rollout} | options


def learner_of(tiny_model: Path, reward_model: Path, **options: Any) -> Learner:
    config = config_of(**options)
    models = load(config, tiny_model, reward_model)[0]
    with torch.no_grad():  # like after some updates
        for parameter in models.actor.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    models = replace(models, scorer=RewardFunction(lambda _prompt, response: SCORES[response[0]]))
    return Learner(models=models, rewards=rewards_of(models), config=config.ppo, distribution=SamplingDistribution())


def experience_of(learner: Learner, completions: list[Completion] | None = None, *, kl_coef: float = 0.2) -> Experience:
    return make_experience(learner, completions or COMPLETIONS, kl_coef=kl_coef, group_size=3)


def shaped_by_hand(advantage: str, rewards: list[float], baselines: list[float]) -> list[float]:
    if advantage == "remax":
        return [r - b for r, b in zip(rewards, baselines, strict=True)]
    if advantage == "reinforce++":
        return rewards
    shaped = []
    for group in (rewards[:3], rewards[3:]):
        for index, reward in enumerate(group):
            others = group[:index] + group[index + 1 :]
            center = statistics.mean(others if advantage == "rloo" else group)
            scale = statistics.stdev(group) + 1e-9 if advantage == "group_norm" else 1.0
            shaped.append((reward - center) / scale)
    return shaped


@pytest.mark.parametrize("advantage", CRITIC_FREE)
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_advantages_equal_a_loop_over_tokens(tiny_model: Path, reward_model: Path, advantage: str, kl_in: str) -> None:
    options = options_of(
        advantage, kl_in=kl_in, kl_estimator="k2", kl_clamp=0.5, gamma=0.9, missing_eos_penalty=1.0, reward_clip=2.5
    )
    learner = learner_of(tiny_model, reward_model, **options)
    assert learner.models.critic is None
    completions = [replace(c, baseline=0.25 * row) for row, c in enumerate(COMPLETIONS)]
    e = experience_of(learner, completions)
    assert e.old_values is None
    rewards = [1.0, 2.5, -2.0, -0.5, 0.5, 0.5]  # 4 - 1 is clipped to 2.5
    assert e.rewards.tolist() == rewards
    shaped = shaped_by_hand(advantage, rewards, [c.baseline for c in completions])
    expected = []
    for row, c in enumerate(COMPLETIONS):
        number = len(c.response_ids)
        log_ratio = (e.old_logprobs - e.ref_logprobs)[row, :number].tolist()
        penalties = [min(d**2 / 2, 0.5) for d in log_ratio]
        coef = 0.2 if kl_in == "reward" else 0.0
        token_rewards = [-coef * p for p in penalties]
        token_rewards[-1] += shaped[row]
        expected.append([sum(0.9 ** (s - t) * token_rewards[s] for s in range(t, number)) for t in range(number)])
    if advantage.startswith("reinforce++"):
        every = [a for row in expected for a in row]
        mean, spread = statistics.mean(every), statistics.pstdev(every)
        expected = [[(a - mean) / spread for a in row] for row in expected]
    for row, values in enumerate(expected):
        assert e.advantages[row, : len(values)].tolist() == pytest.approx(values, abs=1e-4)
        assert not e.advantages[row, len(values) :].any()
    assert e.kl.abs().max() > 0.01


def test_responses_that_are_left_out_have_no_gradient(tiny_model: Path, reward_model: Path) -> None:
    """The update on a rollout with responses to be left out equals the one on the others alone."""
    options = options_of("rloo", kl_in="loss", kl_estimator="k3", entropy_coef=0.1)
    alone = learner_of(
        tiny_model, reward_model, **options | {"minibatch": 3, "rollout": {"num_prompts": 1, "samples_per_prompt": 3}}
    )
    dropping = learner_of(tiny_model, reward_model, **options, drop_equal_groups=True)
    gradients = []
    for learner, completions in ((alone, COMPLETIONS[:3]), (dropping, COMPLETIONS)):
        engine = Recorder(learner.models.actor)
        e = experience_of(learner, completions)
        update(replace(learner, engines={"actor": engine}), e, seed=0, iteration=1)
        gradients.append(engine.gradients)
    assert e.equal_groups is not None
    assert e.equal_groups.tolist() == [False, True]
    assert e.loss_mask.any(dim=1).tolist() == [True] * 3 + [False] * 3
    assert rollout_metrics(e)["groups/equal_fraction"] == 0.5
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert any(g.abs().max() > 1e-4 for g in gradients[0])


def test_truncated_responses_are_left_out(tiny_model: Path, reward_model: Path) -> None:
    e = experience_of(learner_of(tiny_model, reward_model, **options_of("reinforce++", mask_truncated=True)))
    assert e.loss_mask.any(dim=1).tolist() == [True, False, True, False, True, True]
    trained = e.advantages[e.loss_mask]
    assert trained.mean().abs() < 1e-5  # whitened over what is trained on
    assert trained.std(unbiased=False) == pytest.approx(1.0, abs=1e-4)


def test_an_update_on_nothing_changes_nothing(tiny_model: Path, reward_model: Path) -> None:
    learner = learner_of(
        tiny_model, reward_model, **options_of("rloo", drop_equal_groups=True, kl_in="loss", kl_estimator="k2")
    )
    same = replace(learner.models, scorer=RewardFunction(lambda *_: 1.0))
    learner = replace(learner, rewards=rewards_of(same))
    engine = Recorder(learner.models.actor)
    row = update(replace(learner, engines={"actor": engine}), experience_of(learner), seed=0, iteration=1)
    assert not any(g.any() for g in engine.gradients)
    assert all(math.isfinite(value) for value in row.values())


class Recorder:
    """An engine that keeps the gradients of the first step and takes none."""

    def __init__(self, module: Any) -> None:
        self.module, self.gradients = module, []

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> Any:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        return SimpleNamespace(grad_norm=0.0, learning_rate=0.0)


def test_kl_and_entropy_in_the_loss_have_the_gradients_of_autograd(tiny_model: Path, reward_model: Path) -> None:
    """With advantages of 0 the loss is kl_coef x KL - entropy_coef x entropy, computed here with whole logits."""
    options = options_of(
        "reinforce++", kl_in="loss", kl_estimator="k3", entropy_coef=0.3, sampling={"temperature": 0.7}
    )
    learner = learner_of(tiny_model, reward_model, **options)
    distribution = SamplingDistribution(temperature=0.7)
    learner = replace(learner, distribution=distribution, engines={"actor": Recorder(learner.models.actor)})
    e = experience_of(learner, kl_coef=0.2)
    e = replace(e, advantages=torch.zeros_like(e.advantages))
    update(learner, e, seed=0, iteration=1)
    lm, total, tokens = learner.models.actor.lm, torch.zeros(()), 0
    found = learner.engines["actor"].gradients
    lm.zero_grad()
    for c in COMPLETIONS:
        ids, start = torch.tensor([c.prompt_ids + c.response_ids]), len(c.prompt_ids)
        logprobs = torch.log_softmax(lm(ids).logits[0, start - 1 : -1] / 0.7, dim=-1)
        with torch.no_grad():
            reference = torch.log_softmax(learner.models.reference.lm(ids).logits[0, start - 1 : -1] / 0.7, dim=-1)
        chosen = (torch.arange(len(c.response_ids)), torch.tensor(c.response_ids))
        d = logprobs[chosen] - reference[chosen]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        total = total + (0.2 * ((-d).exp() - 1 + d) - 0.3 * entropy).sum()
        tokens += len(c.response_ids)
    (total / tokens).backward()
    expected = [p.grad for p in learner.models.actor.parameters() if p.requires_grad]
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-5
    assert max(b.abs().max() for b in expected) > 1e-3


def test_rejected_tokens_are_left_out(tiny_model: Path, reward_model: Path) -> None:
    """The engine's log-probs are -1 for every token; a k2 of at most 2 nats squared is a gap of at most 2."""
    options = options_of("rloo", rejection={"statistic": "token_k2", "high": 2.0})
    e = experience_of(learner_of(tiny_model, reward_model, **options))
    expected = e.batch.response_mask & ((e.old_logprobs + 1).abs() <= 2)
    assert torch.equal(e.loss_mask, expected)
    assert rollout_metrics(e)["response/left_out"] == pytest.approx(1 - expected.sum().item() / 18)
    whole = options_of("rloo", rejection={"statistic": "seq_max_k2", "high": 2.0})
    e = experience_of(learner_of(tiny_model, reward_model, **whole))
    assert e.loss_mask.any(dim=1).tolist() == [
        bool(row[m].all()) for row, m in zip(expected, e.batch.response_mask, strict=True)
    ]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", 18.0),
        ("sequence-mean", 6.0),
        ("sequence-sum", 6.0),
        ("sequence-sum-norm", 36.0),  # six responses of at most six tokens
    ],
)
def test_denominators_are_those_of_the_whole_minibatch(
    tiny_model: Path, reward_model: Path, aggregation: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(
        tiny_model, reward_model, **options_of("rloo", loss_aggregation=aggregation, training={"microbatch_tokens": 20})
    )
    learner = replace(learner, engines={"actor": Recorder(learner.models.actor)})
    seen = []
    plain = update_module.policy_loss
    monkeypatch.setattr(
        update_module, "policy_loss", lambda *a, **o: seen.append(o["denominator"].item()) or plain(*a, **o)
    )
    update(learner, experience_of(learner), seed=0, iteration=1)
    assert len(seen) > 1
    assert set(seen) == {expected}


@pytest.mark.parametrize("max_tokens", [8, 4096])
def test_demonstrations_add_the_gradient_of_their_loss(
    tiny_model: Path, reward_model: Path, tmp_path: Path, max_tokens: int
) -> None:
    """With advantages of 0 the gradient is ptx_coef times that of the mean loss of the step's demonstrations."""
    learner = learner_of(tiny_model, reward_model, **options_of("reinforce++", ptx_coef=0.5))
    texts = encode_all(
        DEMONSTRATIONS, split="train", tokenizer=load_tokenizer(tiny_model), max_tokens=32, folder=None, log=print
    )
    actor = learner.models.actor
    loss = DemonstrationLoss(actor, texts, batch_size=4, max_tokens=max_tokens, seed=7, group=SINGLE_PROCESS)
    learner = replace(learner, demonstrations=loss, engines={"actor": Recorder(actor)})
    e = experience_of(learner)
    row = update(learner, replace(e, advantages=torch.zeros_like(e.advantages)), seed=0, iteration=3)
    found = learner.engines["actor"].gradients
    rows = (epoch_order(5, seed=7, epoch=1) + epoch_order(5, seed=7, epoch=2))[3:7]  # positions 8 to 11 of the stream
    actor.zero_grad()
    total, tokens = torch.zeros(()), 0
    for text in (texts[index] for index in rows):
        ids, start = torch.tensor([text.prompt_ids + text.response_ids]), len(text.prompt_ids)
        logprobs = torch.log_softmax(actor.lm(ids).logits[0, start - 1 : -1], dim=-1)
        total = total - logprobs[torch.arange(len(text.response_ids)), text.response_ids].sum()
        tokens += len(text.response_ids)
    (0.5 * total / tokens).backward()
    expected = [p.grad for p in actor.parameters() if p.requires_grad]
    assert row["loss/ptx"] == pytest.approx((total / tokens).item(), abs=1e-4)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_responses_to_a_prompt_stay_on_one_rank_together(world_size: int) -> None:
    size, minibatch = 3, 12
    rollout = [completion([number // size], [1] * (1 + number * 7 % 11)) for number in range(24)]
    ranks = [SimpleNamespace(rank=rank, world_size=world_size) for rank in range(world_size)]
    rows = [local_rows(24, minibatch, rank) for rank in ranks]
    everything = [(row, rollout[row]) for part in rows for row in part]
    found = []
    for rank, part in zip(ranks, rows, strict=True):
        sampled = [rollout[row].prompt_ids[0] for row in part]
        assert all(sampled.count(prompt) == size for prompt in sampled)
        rank.gather = lambda _: everything
        found.append(share_rollout(part, [rollout[row] for row in part], minibatch, rank, group_size=size))
    for own in found:
        assert len(own) == 24 // world_size
        for start in range(0, len(own), size):
            assert len({c.prompt_ids[0] for c in own[start : start + size]}) == 1
    for start in range(0, 24, minibatch):
        share = minibatch // world_size
        dealt = [id(c) for own in found for c in own[start // world_size :][:share]]
        assert sorted(dealt) == sorted(id(c) for c in rollout[start : start + minibatch])


@pytest.mark.parametrize(("advantage", "frozen"), [(name, 2 * (number % 2)) for number, name in enumerate(CRITIC_FREE)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_model: Path, reward_model: Path, tmp_path: Path, advantage: str, frozen: int
) -> None:
    rollout = {"num_prompts": 4, "samples_per_prompt": 2} if advantage in GROUP_ESTIMATORS else {}
    stage = config_of(advantage=advantage, frozen=frozen, num_iterations=3, eval_every=1, rollout=rollout)
    whole = trainer_of(stage, tiny_model, reward_model, reward=share_of_low_ids)
    history = whole.train(PROMPTS, VALIDATION)
    assert list(whole.learner.engines) == ["actor"]
    assert not any(name.startswith(("critic/", "value/", "loss/value")) for name in history[0])
    assert "num_iterations" in final_metrics(history)
    options: dict[str, Any] = {"reward": share_of_low_ids, "checkpoints": checkpoints_every_step(tmp_path, "ppo")}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(stage, tiny_model, reward_model, interrupt_at=2, **options).train(PROMPTS, VALIDATION)
    resumed = trainer_of(
        stage, tiny_model, reward_model, reward=share_of_low_ids, checkpoints=checkpoints_every_step(tmp_path, "ppo")
    )
    assert without_times(resumed.train(PROMPTS, VALIDATION)) == without_times(history)
    assert largest_gap(weights(resumed), weights(whole)) == 0.0


def test_the_baseline_of_remax_is_the_reward_of_the_greedy_response(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(advantage="remax", missing_eos_penalty=0.5, reward_clip=0.6)
    trainer = trainer_of(stage, tiny_model, reward_model, reward=share_of_low_ids)
    sampled = trainer.rollout.generate(PROMPTS, stage.ppo.rollout.sampling, range(5))
    for c in trainer._with_baselines(sampled):
        ids = list(c.prompt_ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(trainer.learner.models.actor.lm(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        response = ids[len(c.prompt_ids) :]
        expected = share_of_low_ids([], response) - 0.5 * (response[-1] != 0)
        assert c.baseline == pytest.approx(max(min(expected, 0.6), -0.6))


def test_only_the_critic_is_trained_in_its_warmup(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(num_iterations=3, critic={"warmup_iterations": 2, "schedule": "linear", "warmup_fraction": 0.5})
    trainer = trainer_of(stage, tiny_model, reward_model, reward=share_of_low_ids)
    before = weights(trainer)
    rows = [trainer._iterate(1, PROMPTS), trainer._iterate(2, PROMPTS)]
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("actor."))
    assert not all(torch.equal(before[name], after[name]) for name in before if name.startswith("critic."))
    assert all("loss/policy" not in row and row["kl/sequence"] == 0.0 for row in rows)
    # Six steps of the critic, three of them warm-up, on the way from 0 to 1e-3; two of the actor.
    assert rows[0]["critic/learning_rate"] == pytest.approx((1 + 2) / 2 * 1e-3 / 4)
    third = trainer._iterate(3, PROMPTS)
    assert third["actor/learning_rate"] == pytest.approx(1e-3)
    assert not all(torch.equal(after[n], p) for n, p in weights(trainer).items() if n.startswith("actor."))


def test_the_warmup_of_the_critic_is_no_lack_of_improvement(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(num_iterations=5, eval_every=1, patience=2, critic={"warmup_iterations": 3})
    trainer = trainer_of(stage, tiny_model, reward_model, reward=share_of_low_ids)
    history = trainer.train(PROMPTS, VALIDATION)
    assert len(history) == 5
    assert [evaluation.iteration for evaluation in trainer.outcome.evaluations] == [0, 4, 5]


def test_a_critic_without_a_reward_model_starts_from_the_sft_model(tiny_model: Path) -> None:
    trainer = trainer_of(config_of(frozen=1), tiny_model, None, reward=share_of_low_ids)
    models = trainer.learner.models
    assert models.reward_model is None and models.critic is not None and models.shared_trunk
    layers = zip(models.critic.lm.model.layers, models.reference.lm.model.layers, strict=True)
    for one, other in layers:
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    history = trainer.train(PROMPTS, VALIDATION)
    assert all(math.isfinite(value) for row in history for value in row.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": "rloo"}, "rloo compares the responses to a prompt, but rollout.samples_per_prompt is 1; set it to 2 or more"),
        (
            {"advantage": "group_norm", "rollout": {"num_prompts": 16, "samples_per_prompt": 3}, "minibatch": 8},
            "minibatch is 8, but with advantage group_norm each of the 1 processes .* takes all 3 responses .* multiple of 3",
        ),
        (
            {"advantage": "dr_grpo", "rollout": {"samples_per_prompt": 4}, "minibatch": 4, "training": {"num_processes": 2}},
            "choose a multiple of 8",
        ),
        ({"drop_equal_groups": True}, "drop_equal_groups needs an advantage that compares the responses"),
        ({"advantage": "reinforce++", "gae_lambda": 0.9}, "gae_lambda is set, but advantage reinforce\\+\\+ has no critic"),
        ({"advantage": "remax", "value_clip_range": None}, "value_clip_range is set, but advantage remax has no critic"),
        ({"advantage": "remax", "critic": {"trains": "head"}}, "critic is set, but advantage remax has no critic"),
        ({"critic": {"warmup_iterations": 100}}, "the actor would never be trained"),
        ({"kl_in": "loss"}, "kl_estimator is k1, whose gradient in the loss .* is zero on average; set kl_estimator to k2 or k3"),
        ({"policy_ratio": "cispo", "dual_clip": 3.0}, "dual_clip does nothing with policy_ratio cispo"),
        ({"importance_mode": "mask"}, "importance_mode needs bounds"),
        ({"rejection": {"statistic": "token_k3", "high": 1.0, "low": 0.5}}, "token_k3 is never negative and has only an upper bound"),
        ({"rejection": {"statistic": "seq_sum_k1", "high": 0.5}}, "low is above high, 0.5"),
        ({"rejection": {"statistic": "token_k3", "high": 1.0}, "old_logprobs": "engine"}, "rejection compares the log-probs"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PpoConfig(**settings)


def test_validation_does_not_compare_responses(tiny_model: Path, reward_model: Path) -> None:
    stage = config_of(advantage="group_norm", eval_every=1, rollout={"num_prompts": 4, "samples_per_prompt": 2})
    trainer: PpoTrainer = trainer_of(stage, tiny_model, reward_model, reward=share_of_low_ids)
    history = trainer.train(PROMPTS, VALIDATION)  # three prompts, not a multiple of two
    assert "validation/score/mean" in history[0]
    assert "validation/groups/equal_fraction" not in history[0]
    assert "groups/equal_fraction" in history[0]
