"""The agreement of a judge with people, and its interval."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from components.rlhf.data.records import PreferencePair
from components.rlhf.rewards.agreement import Agreement, binomial_interval, independent_pairs, measure_agreement

NAN = float("nan")


def distinct_pairs(count: int) -> list[PreferencePair]:
    return [PreferencePair(prompt=f"question {i}", chosen="better", rejected="bad") for i in range(count)]


def pairs_of(prompt: str, texts: list[str]) -> list[PreferencePair]:
    """All pairs of a ranking, best text first."""
    return [PreferencePair(prompt=prompt, chosen=a, rejected=b) for a, b in itertools.combinations(texts, 2)]


def measured(
    wins: list[float], pairs: list[PreferencePair] | None = None, consistent: list[bool] | None = None
) -> Agreement:
    agreement = measure_agreement(
        torch.tensor(wins),
        distinct_pairs(len(wins)) if pairs is None else pairs,
        torch.tensor([True] * len(wins) if consistent is None else consistent),
    )
    assert agreement is not None
    return agreement


# (successes, trials, confidence) -> interval; the ends for 0 or n of n have a closed form: (tail)^(1/n)
KNOWN = {
    (8, 10, 0.95): (0.4439, 0.9748),
    (2, 10, 0.95): (0.0252, 0.5561),
    (5, 10, 0.95): (0.1871, 0.8129),
    (0, 10, 0.95): (0.0, 0.3085),
    (10, 10, 0.95): (0.6915, 1.0),
    (1, 1, 0.95): (0.025, 1.0),
    (0, 1, 0.95): (0.0, 0.975),
    (0, 3, 0.90): (0.0, 1 - 0.05 ** (1 / 3)),
    (60, 100, 0.95): (0.4972, 0.6967),
}


@pytest.mark.parametrize(("case", "interval"), KNOWN.items(), ids=str)
def test_interval_has_the_known_ends(case: tuple[float, int, float], interval: tuple[float, float]) -> None:
    successes, trials, confidence = case
    assert binomial_interval(successes, trials, confidence=confidence) == pytest.approx(interval, abs=6e-5)


@pytest.mark.parametrize("num", [5, 20, 100, 333])
@pytest.mark.parametrize("probability", [0.5, 0.1, 0.83])
def test_interval_misses_the_probability_as_rarely_as_promised(num: int, probability: float) -> None:
    """Each end is on the wrong side with a probability of 2.5% at most: summed over all results, not sampled."""
    intervals = [binomial_interval(k, num, confidence=0.95) for k in range(num + 1)]
    weights = binom.pmf(range(num + 1), num, probability)
    above = sum(weight for (low, _), weight in zip(intervals, weights, strict=True) if low > probability)
    below = sum(weight for (_, high), weight in zip(intervals, weights, strict=True) if high < probability)
    assert above <= 0.025 and below <= 0.025
    if num >= 100:  # and it is not needlessly wide
        assert above >= 0.008 and below >= 0.008


@given(trials=st.integers(1, 300), halves=st.data())
def test_interval_surrounds_the_fraction_and_mirrors(trials: int, halves: st.DataObject) -> None:
    successes = halves.draw(st.integers(0, 2 * trials)) / 2
    low, high = binomial_interval(successes, trials, confidence=0.95)
    assert 0 <= low <= successes / trials <= high <= 1 and low < high
    mirrored = binomial_interval(trials - successes, trials, confidence=0.95)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    if successes <= trials - 0.5:
        more = binomial_interval(successes + 0.5, trials, confidence=0.95)
        assert more[0] > low and more[1] >= high


def test_interval_is_wider_with_more_confidence_and_fewer_pairs() -> None:
    (a, b), (c, d), (e, f) = (
        binomial_interval(0.7 * n, n, confidence=c) for n, c in ((100, 0.9), (100, 0.99), (1000, 0.9))
    )
    assert c < a < e and f < b < d


@pytest.mark.parametrize(
    ("pairs", "count"),
    [
        (distinct_pairs(7), 7),
        (distinct_pairs(1), 1),
        (pairs_of("", ["a", "b", "c", "d"]), 2),
        (pairs_of("", ["a", "b", "c"]), 1),
        (distinct_pairs(1) * 5, 1),
        (pairs_of("one", ["a", "b", "c", "d"]) + pairs_of("two", ["a", "b", "c", "d"]), 4),
        ([PreferencePair(prompt="", chosen=f"good {i}", rejected=f"bad {i}") for i in range(6)], 6),
        ([PreferencePair(prompt="", chosen="same", rejected="same")], 1),
        ([], 0),
    ],
    ids=[
        "distinct", "one", "6 pairs of 4 texts", "3 pairs of 3 texts", "one pair 5 times", "two rankings of 4", "no prompt",
        "equal texts", "none",
    ],
)  # fmt: skip
def test_number_of_independent_pairs(pairs: list[PreferencePair], count: int) -> None:
    assert independent_pairs(pairs) == count


@pytest.mark.parametrize(
    ("pairs", "count"),
    [
        ([PreferencePair(prompt="", chosen="best", rejected=f"bad {i}") for i in range(9)], 1),
        (pairs_of("one", ["a", "b", "c"]) + pairs_of("two", ["a", "b", "c"]), 2),
    ],
    ids=["one text against 9 others", "two rankings of 3"],
)
def test_number_of_independent_pairs_has_each_text_in_one_pair(pairs: list[PreferencePair], count: int) -> None:
    """Half the number of texts is too many here: texts of the rest have no partner left."""
    assert independent_pairs(pairs) == count


def test_accuracy_is_the_mean_of_the_wins() -> None:
    agreement = measured([1.0] * 8 + [0.0] * 2)
    assert (agreement.num_pairs, agreement.num_independent) == (10, 10)
    assert agreement.accuracy == pytest.approx(0.8, abs=1e-6)
    assert (agreement.low, agreement.high) == pytest.approx((0.4439, 0.9748), abs=6e-5)


def test_ties_are_halves() -> None:
    agreement = measured([0.5, 0.5, 1.0, 0.0, 1.0])
    assert agreement.accuracy == pytest.approx(0.6, abs=1e-6)
    assert (agreement.low, agreement.high) == pytest.approx(binomial_interval(3, 5, confidence=0.95), abs=1e-6)
    only_ties = measured([0.5] * 200)
    assert only_ties.accuracy == 0.5 and only_ties.low < 0.5 < only_ties.high
    assert not only_ties.is_above_chance


def test_pairs_of_one_prompt_count_once() -> None:
    """Right on all 40 pairs of 6 of 10 prompts, and wrong on those of the others: that is 6 of 10, not 240 of 400."""
    pairs = [
        PreferencePair(prompt=f"p{p}", chosen=f"good {n}", rejected=f"bad {n}") for p in range(10) for n in range(40)
    ]
    agreement = measured([1.0] * 240 + [0.0] * 160, pairs, [True] * 400)
    assert (agreement.num_pairs, agreement.num_independent) == (400, 10)
    assert (agreement.low, agreement.high) == pytest.approx((0.2624, 0.8784), abs=1e-4)  # of 6 in 10
    assert not agreement.is_above_chance


def test_pairs_without_an_answer_are_left_out() -> None:
    """In every number, not only in the accuracy."""
    pairs = [
        PreferencePair(prompt="a", chosen="long one", rejected="no"),
        PreferencePair(prompt="b", chosen="no", rejected="long one"),
        PreferencePair(prompt="c", chosen="no", rejected="long one"),
        PreferencePair(prompt="d", chosen="long one", rejected="no"),
    ]
    agreement = measured([1.0, NAN, NAN, 0.0], pairs, [True, False, False, True])
    assert agreement.num_asked == 4
    assert replace(agreement, num_asked=2) == measured([1.0, 0.0], [pairs[0], pairs[3]], [True, True])
    assert (agreement.num_pairs, agreement.accuracy, agreement.longer_wins, agreement.consistency) == (2, 0.5, 1.0, 1.0)


@pytest.mark.parametrize("wins", [[NAN, NAN], []], ids=["no answer", "no pairs"])
def test_there_is_no_agreement_without_answers(wins: list[float]) -> None:
    assert (
        measure_agreement(torch.tensor(wins), distinct_pairs(len(wins)), torch.ones(len(wins), dtype=torch.bool))
        is None
    )


def test_interval_is_that_of_the_independent_pairs() -> None:
    """All pairs of one ranking of 8 texts are no more evidence than 4 pairs."""
    pairs = pairs_of("", list("abcdefgh"))
    agreement = measured([1.0] * 28, pairs)
    assert (agreement.num_pairs, agreement.num_independent) == (28, 4)
    assert (agreement.low, agreement.high) == pytest.approx((0.025**0.25, 1.0))
    assert not agreement.is_above_chance
    assert measured([1.0] * 28).is_above_chance


def test_longer_wins_is_the_accuracy_of_preferring_the_longer_text() -> None:
    texts = [("longer", "short"), ("longer", "short"), ("tiny", "longer"), ("equal", "abcde")]
    pairs = [PreferencePair(prompt=str(i), chosen=a, rejected=b) for i, (a, b) in enumerate(texts)]
    for wins in ([1.0] * 4, [0.0] * 4):
        assert measured(wins, pairs).longer_wins == (1 + 1 + 0 + 0.5) / 4


def test_consistency_is_the_fraction_with_one_answer_in_both_orders() -> None:
    assert measured([1.0, 1.0, 0.5, 0.0], consistent=[True, True, False, True]).consistency == 0.75
    assert measured([0.5] * 3, consistent=[False] * 3).consistency == 0.0


@pytest.mark.parametrize(
    ("wins", "num", "is_above"),
    [(60, 100, False), (61, 100, True), (5, 5, False), (6, 6, True), (0, 100, False), (50, 100, False), (540, 1000, True)],
)  # fmt: skip
def test_judge_is_above_chance_if_the_whole_interval_is(wins: int, num: int, is_above: bool) -> None:
    """With 60 of 100 the lower end is 0.497, and 0.478 = 0.025^(1/5) with 5 of 5."""
    agreement = measured([1.0] * wins + [0.0] * (num - wins))
    assert agreement.is_above_chance is is_above
    assert agreement.is_above_chance == (agreement.low > 0.5)


def test_explanation_gives_the_interval_and_the_number_of_pairs() -> None:
    explanation = measured([1.0] * 8 + [0.0] * 2).explain()
    assert explanation == "80.0% [44.4%, 97.5%] on 10 held-out human pairs"
