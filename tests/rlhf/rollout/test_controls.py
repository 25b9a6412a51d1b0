"""top-p, top-k, min-p and the repetition penalty in the engine hf and in the actor."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.models import actor as actor_module
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.controls import sampling_distribution
from tests.rlhf.rollout.test_hf import MANY_STOPS, PROMPTS, TEXTS, engine_of, ids_of
from tests.support.small_models import actor_of, batch

CONTROLS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.2},
    "all three, cold": {"top_p": 0.8, "top_k": 20, "min_p": 0.05, "temperature": 0.7},
    "penalty": {"repetition_penalty": 1.7},
    "everything": {"top_p": 0.8, "top_k": 30, "repetition_penalty": 0.6, "temperature": 1.4, "min_new_tokens": 3},
}
every_control = pytest.mark.parametrize("controls", CONTROLS.values(), ids=CONTROLS.keys())


def slow_probabilities(
    logits: Tensor, ids: list[int], step: int, how: SamplingConfig, stops: tuple[int, ...], *, truncate: bool = True
) -> Tensor:
    """Probabilities [V] of the next token after ids, step by step in the order of vLLM, for one token at a time."""
    scores = logits.double().clone()
    if step < how.min_new_tokens:
        scores[list(stops)] = -math.inf
    for token in set(ids):
        scores[token] = (
            scores[token] / how.repetition_penalty if scores[token] > 0 else scores[token] * how.repetition_penalty
        )
    p = torch.softmax(scores / how.temperature, dim=-1)
    if not truncate:
        return p
    p[p < how.min_p * p.max()] = 0
    order = p.argsort(descending=True)
    if how.top_k:
        p[order[how.top_k :]] = 0
    p /= p.sum()
    mass = 0.0
    for token in order.tolist():
        before, mass = mass, mass + p[token].item()
        if before >= how.top_p:
            p[token] = 0
    return p / p.sum()


def are_sampled_from(probabilities: Tensor, tokens: Tensor) -> bool:
    """Only possible tokens, and each as often as it should be (chi-square; tokens expected less than 8 times count as one)."""
    expected = probabilities / probabilities.sum() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    rare = expected < 8
    merged = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    if merged[1][-1] == 0:
        merged = [x[:-1] for x in merged]
    is_possible = bool((probabilities[tokens] > 0).all())
    return is_possible and (len(merged[0]) == 1 or bool(chisquare(*(x.numpy() for x in merged)).pvalue > 1e-3))


def slow_logprobs(folder: Path, completion: Completion, how: SamplingConfig, stops: tuple[int, ...]) -> list[float]:
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, start = completion.prompt_ids + completion.response_ids, len(completion.prompt_ids)
    with torch.no_grad():
        logits = lm(torch.tensor([ids])).logits[0]
    return [
        math.log(slow_probabilities(logits[start + t - 1], ids[: start + t], t, how, stops)[ids[start + t]])
        for t in range(len(completion.response_ids))
    ]


@every_control
def test_logprobs_of_engine_and_actor_are_those_of_a_slow_version(tiny_model: Path, controls: dict[str, Any]) -> None:
    config = SamplingConfig(max_new_tokens=8, **controls)
    found = engine_of(tiny_model, stop_ids=MANY_STOPS).generate(PROMPTS * 2, config, range(12))
    rows = collate([c.prompt_ids for c in found], [c.response_ids for c in found])
    with torch.no_grad():
        logprobs, _ = actor_of(tiny_model)(rows, sampling_distribution(config, MANY_STOPS))
    for row, c in zip(logprobs, found, strict=True):
        expected = torch.tensor(slow_logprobs(tiny_model, c, config, MANY_STOPS))
        assert c.logprobs is not None
        assert torch.allclose(c.logprobs, expected, atol=1e-4)
        assert torch.allclose(row[: len(c.response_ids)], expected, atol=1e-4)


@every_control
def test_completion_does_not_depend_on_its_batch(tiny_model: Path, controls: dict[str, Any]) -> None:
    engine, seeds = engine_of(tiny_model, stop_ids=MANY_STOPS), [11, 5, 11, 3, 99, 0]
    expected = engine.generate(PROMPTS, SamplingConfig(max_new_tokens=12, **controls), seeds)
    alone = engine.generate(PROMPTS[::-1], SamplingConfig(max_new_tokens=12, batch_size=2, **controls), seeds[::-1])
    assert ids_of(alone)[::-1] == ids_of(expected)


@every_control
def test_token_frequencies_are_those_of_the_truncated_distribution(tiny_model: Path, controls: dict[str, Any]) -> None:
    engine, number = engine_of(tiny_model, stop_ids=()), 3000
    config = SamplingConfig(**(controls | {"max_new_tokens": 1, "min_new_tokens": 0, "batch_size": 3000}))
    found = engine.generate([Prompt(prompt="a film")] * number, config, range(number))
    tokens = torch.tensor(ids_of(found))[:, 0]
    with torch.no_grad():
        logits = engine.model(torch.tensor([found[0].prompt_ids])).logits[0, -1]
    expected = slow_probabilities(logits, found[0].prompt_ids, 0, config, ())
    assert are_sampled_from(expected, tokens)


@pytest.mark.parametrize("penalty", [1.8, 0.5])
def test_greedy_decoding_with_a_penalty_equals_transformers(tiny_model: Path, penalty: float) -> None:
    engine = engine_of(tiny_model, stop_ids=())
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    lm.generation_config.eos_token_id = None
    config = SamplingConfig(max_new_tokens=12, repetition_penalty=penalty, top_k=3, top_p=0.5)
    found = engine.generate(PROMPTS, config, range(6), greedy=True)
    for text, ids in zip(TEXTS, ids_of(found), strict=True):
        prompt = engine.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        out = lm.generate(**prompt, do_sample=False, max_new_tokens=12, repetition_penalty=penalty)
        assert out[0, prompt["input_ids"].shape[1] :].tolist() == ids
    assert ids_of(found) != ids_of(engine.generate(PROMPTS, SamplingConfig(max_new_tokens=12), range(6), greedy=True))


def gradients_of(actor: Actor, distribution: SamplingDistribution) -> tuple[Tensor, Tensor, list[Tensor]]:
    actor.zero_grad()
    logprobs, entropy = actor(batch(), distribution, with_entropy=True)
    (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
    return logprobs.detach(), entropy.detach(), [p.grad.clone() for p in actor.parameters() if p.grad is not None]


@every_control
def test_pieces_do_not_change_logprobs_entropy_and_gradients(
    tiny_model: Path, controls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution, actor = sampling_distribution(SamplingConfig(**controls), (0,)), actor_of(tiny_model)
    logprobs, entropy, gradients = gradients_of(actor, distribution)
    rows: list[int] = []
    for name in ("kept_tokens", "penalize_repetition"):
        plain = getattr(actor_module, name)
        monkeypatch.setattr(
            actor_module, name, lambda x, *args, plain=plain, **how: rows.append(len(x)) or plain(x, *args, **how)
        )
    monkeypatch.setattr(actor_module, "MAX_LOGITS", 2 * actor.lm.config.vocab_size)
    in_pieces = gradients_of(actor, distribution)
    assert max(rows) == 2  # never more logits at once
    possible = logprobs.isfinite()
    assert torch.allclose(in_pieces[0][possible], logprobs[possible], atol=1e-6)
    assert torch.allclose(in_pieces[1], entropy, atol=1e-5)
    for a, b in zip(in_pieces[2], gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_token_that_a_model_would_not_keep_has_a_finite_logprob(tiny_model: Path) -> None:
    """The texts of the batch were not sampled from this model, so most of their tokens are outside of what it keeps."""
    logprobs, entropy = actor_of(tiny_model)(batch(), SamplingDistribution(top_k=1), with_entropy=True)
    assert logprobs.isfinite().all()
    assert (logprobs[batch().response_mask] < -0.01).any()
    # Of at most two tokens.
    assert (entropy <= math.log(2) + 1e-6).all()


def test_default_controls_change_no_bit(tiny_model: Path) -> None:
    """A penalty of 1 and truncations that keep everything compute nothing."""
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32)
    actor = Actor(lm, num_frozen_layers=0, dtype=torch.float32)
    plain = SamplingDistribution(temperature=0.7)
    assert not plain.truncates and sampling_distribution(SamplingConfig(temperature=0.7), ()) == plain
    logits = torch.randn(3, 257)
    assert plain.truncate(logits, torch.zeros(3, dtype=torch.int64)) is logits
    kept_all = SamplingDistribution(temperature=0.7, top_k=257)
    assert torch.equal(actor(batch(), plain)[0], actor(batch(), kept_all)[0])
