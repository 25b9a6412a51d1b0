"""Penalties of length and repetition, against slow versions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.rewards.shaping import LengthScorer, RepetitionScorer, length_penalty, repeated_fraction
from tests.support.ppo_runs import completion
from tests.support.reward_server import completions


def dapo(length: int, longest: int, cache: int) -> float:
    """Equation 13 of DAPO."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@given(st.integers(0, 300), st.integers(1, 200), st.data())
def test_length_penalty_is_that_of_dapo(length: int, longest: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(1, longest))
    found = length_penalty(torch.tensor([float(length)]), min_tokens=0, max_tokens=longest, buffer=cache)
    assert found.item() == pytest.approx(dapo(length, longest, cache))


def test_lengths_by_hand() -> None:
    scorer = LengthScorer(min_tokens=4, max_tokens=10, buffer=4)
    rows = [completions("", ids=[7] * n)[0] for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)]
    assert scorer.score(rows).tolist() == [-0.75, -0.5, -0.25, 0, 0, 0, -0.25, -0.5, -1, -1]
    assert scorer.score([]).shape == (0,)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_repeated_fraction_is_that_of_a_slow_version(ids: list[int], ngram: int) -> None:
    total = repeated = 0
    for end in range(ngram, len(ids) + 1):
        total += 1
        current = ids[end - ngram : end]
        repeated += any(ids[start : start + ngram] == current for start in range(end - ngram))
    assert repeated_fraction([ids], ngram) == pytest.approx(repeated / total if total else 0.0)


def test_repetition_by_hand() -> None:
    rows = [completions("", ids=ids)[0] for ids in ([1, 2, 3, 4], [1, 2, 1, 2], [1, 1, 1, 1, 1], [1])]
    assert RepetitionScorer(ngram=2).score(rows).tolist() == pytest.approx([0, -1 / 3, -0.75, 0])


def test_shaping_counts_tokens_of_the_model_alone() -> None:
    """The environment repeats 7, 7 and makes the response long; what the model says in two turns is not adjacent."""
    one = replace(completion([1], [5, 6, 7, 7, 7, 7, 5, 6]), response_mask=[True] * 2 + [False] * 4 + [True] * 2)
    assert LengthScorer(min_tokens=0, max_tokens=6, buffer=4).score([one]).tolist() == [-0.5]  # 4 tokens
    assert RepetitionScorer(ngram=2).score([one]).tolist() == [-0.5]  # (5, 6) twice, and no (6, 5)
    assert RepetitionScorer(ngram=3).score([one]).tolist() == [0.0]
