import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import components.rlhf.maths.truncation as truncation
from components.rlhf.maths.kl import exact_kl, truncated_kl
from components.rlhf.maths.logprobs import entropy, token_logprobs
from components.rlhf.maths.truncation import keep_only, kept_tokens, penalize_repetition, seen_tokens
from tests.support.random_batches import equal, randn

INF = float("inf")


def slow_kept(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[bool]:
    """Token by token, in the order of their probability, in plain Python."""
    scaled = [x / temperature for x in logits]
    left = {i for i, x in enumerate(scaled) if x > -INF}
    weight = [math.exp(x - max(scaled)) for x in scaled]
    left = {i for i in left if weight[i] >= min_p}
    if top_k:
        bound = sorted((scaled[i] for i in left), reverse=True)[:top_k][-1]
        left = {i for i in left if scaled[i] >= bound}
    total, mass, nucleus = sum(weight[i] for i in left), 0.0, set()
    for i in sorted(left, key=lambda i: -scaled[i]):
        if mass < top_p:
            nucleus |= {j for j in left if scaled[j] == scaled[i]}
        mass += weight[i] / total
    return [i in nucleus for i in range(len(logits))]


# Distinct by more than rounding, with some impossible tokens.
LOGIT_LISTS = st.lists(st.integers(-30, 30), min_size=1, max_size=12).map(lambda xs: [x / 4 for x in xs])
CONTROLS = {
    "temperature": st.sampled_from([0.5, 1.0, 1.5]),
    "top_k": st.integers(0, 14),
    "top_p": st.sampled_from([0.03, 0.31, 0.57, 0.83, 0.97, 1.0]),
    "min_p": st.sampled_from([0.0, 0.023, 0.17, 0.71]),
}


@settings(max_examples=300, deadline=None)
@given(LOGIT_LISTS, st.sets(st.integers(0, 11)), st.fixed_dictionaries(CONTROLS))
def test_kept_tokens_are_those_of_a_slow_version(
    logits: list[float], impossible: set[int], how: dict[str, Any]
) -> None:
    logits = [-INF if i in impossible and i else x for i, x in enumerate(logits)]
    kept = kept_tokens(torch.tensor([logits, logits], dtype=torch.float64), **how)
    assert kept.tolist() == [slow_kept(logits, **how)] * 2
    assert kept.any(dim=-1).all()


@pytest.mark.parametrize("candidates", [(1,), (3, 10), (200,), (1000,)])
@pytest.mark.parametrize("top_p", [0.02, 0.6, 0.999])
def test_nucleus_does_not_depend_on_how_many_tokens_are_looked_at_first(
    candidates: tuple[int, ...], top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.cat([8 * randn(5, 200), randn(5, 200), 0.01 * randn(5, 200)])
    expected = [slow_kept(row, 1.0, 0, top_p, 0.0) for row in logits.tolist()]
    monkeypatch.setattr(truncation, "CANDIDATES", candidates)
    assert kept_tokens(logits, top_p=top_p).tolist() == expected


@pytest.mark.parametrize(
    ("how", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_single_controls_are_those_of_transformers(how: dict[str, Any], warper: Any) -> None:
    scores = 2 * randn(50, 300).float()
    assert torch.equal(kept_tokens(scores, **how), ~warper(None, scores.clone()).isneginf())


def test_hand_computed_sets_in_the_order_of_vllm() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept_tokens(logits, top_p=0.7).tolist() == [[True, True, False, False]]
    assert kept_tokens(logits, top_p=0.71).tolist() == [[True, True, True, False]]
    # Of the two that top-k keeps, 0.4 is 57%; of all tokens it would be 40%.
    assert kept_tokens(logits, top_k=2, top_p=0.5).tolist() == [[True, False, False, False]]
    # min-p of 0.45 keeps three tokens, of which 0.4 and 0.3 are 78%.
    assert kept_tokens(logits, min_p=0.45, top_p=0.75).tolist() == [[True, True, False, False]]
    assert kept_tokens(torch.zeros(1, 4), top_k=2).tolist() == [[True] * 4]  # of equal probability
    assert kept_tokens(torch.zeros(1, 4), top_p=0.3).tolist() == [[True] * 4]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.fixed_dictionaries(CONTROLS))
def test_logprobs_gradient_and_entropy_are_those_of_the_renormalized_distribution(
    seed: int, how: dict[str, Any]
) -> None:
    logits, labels, scale = 3 * randn(6, 40, seed=seed), torch.arange(6) * 6, randn(6, seed=seed + 1)
    temperature = how.pop("temperature")
    kept = [slow_kept(row, temperature, **how) for row in logits.tolist()]
    gradients = []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        if ours:
            with torch.no_grad():
                mask = kept_tokens(leaf, temperature, **how)
            left = keep_only(leaf, mask, labels)
            found, spread = token_logprobs(left, labels, temperature), entropy(left.detach(), temperature)
        else:
            rows = []
            for row, label, inside in zip(leaf, labels.tolist(), kept, strict=True):
                ids = [i for i, is_kept in enumerate(inside) if is_kept or i == label]
                weights = torch.exp(row[ids] / temperature)
                p = weights / weights.sum()
                rows.append((torch.log(p[ids.index(label)]), -(p * p.log()).sum().detach()))
            expected, expected_spread = (torch.stack(column) for column in zip(*rows, strict=True))
            found, spread = expected, expected_spread
        (found * scale).sum().backward()
        gradients.append((found.detach(), spread, leaf.grad))
    assert gradients[0][0].isfinite().all()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_penalty_is_that_of_transformers() -> None:
    logits, ids = 3 * randn(4, 30).float(), torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    seen = seen_tokens(ids, torch.full((4,), 9), 30)
    assert torch.equal(penalize_repetition(logits, seen, 1.3), expected)
    assert equal(
        penalize_repetition(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]]), 4.0), [[0.5, -8, 2]]
    )


def test_seen_tokens_are_those_before_the_length() -> None:
    ids = torch.tensor([[4, 1, 1, 0], [2, 3, 0, 0]])
    assert seen_tokens(ids, torch.tensor([3, 1]), 5).tolist() == [
        [False, True, False, False, True],
        [False, False, True, False, False],
    ]
    assert not seen_tokens(ids, torch.tensor([0, 0]), 5).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.fixed_dictionaries(CONTROLS))
def test_truncated_kl_is_the_mean_log_ratio_of_sampled_tokens(seed: int, how: dict[str, Any]) -> None:
    temperature = how.pop("temperature")
    logits, ref = 2 * randn(3, 12, seed=seed), 2 * randn(3, 12, seed=seed + 1)
    kept, ref_kept = (kept_tokens(x, temperature, **how) for x in (logits, ref))
    expected = torch.zeros(3, dtype=torch.float64)
    for token in range(12):
        labels = torch.full((3,), token)
        ours, theirs = (
            token_logprobs(keep_only(x, k, labels), labels, temperature) for x, k in ((logits, kept), (ref, ref_kept))
        )
        expected += torch.where(kept[:, token], ours.exp() * (ours - theirs), 0)
    found = truncated_kl(logits, ref, kept, ref_kept, temperature)
    assert equal(found, expected)
    assert equal(truncated_kl(logits, logits, kept, kept, temperature), torch.zeros(3))
    everything = torch.ones_like(kept)
    assert equal(truncated_kl(logits, ref, everything, everything, temperature), exact_kl(logits, ref, temperature))


def test_logits_that_are_not_finite_are_no_crash() -> None:
    logits = torch.zeros(2, 600)
    logits[1, 3] = math.nan
    kept = kept_tokens(logits, top_p=0.5, top_k=20, min_p=0.1)
    assert kept[0].all()
    assert kept.shape == (2, 600)


def test_no_rows_have_no_kept_tokens() -> None:
    """A rank may have fewer tokens than others."""
    empty: Tensor = torch.zeros(0, 7)
    assert kept_tokens(empty, top_p=0.5, top_k=2, min_p=0.1).shape == (0, 7)
    assert keep_only(empty, kept_tokens(empty, top_p=0.5), torch.zeros(0, dtype=torch.int64)).shape == (0, 7)
