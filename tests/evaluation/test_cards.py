from typing import Any

import pytest

from components.evaluation import cards
from components.evaluation.cards import REST, Card, Listing, as_attributes, list_cards
from components.evaluation.compare import Comparison
from components.evaluation.judging import Judged
from components.evaluation.samples import choose_disagreements, gains_of
from tests.support.comparisons import both_of, comparison_of, judged_of, pairwise_of

# Gains of -20, -19, ..., 19 in shuffled order.
GAINS = [float((17 * i) % 40 - 20) for i in range(40)]
NAN = float("nan")


def forty_prompts() -> tuple[Comparison, Judged]:
    return both_of([100.0] * 40, [100.0 + gain for gain in GAINS])


def listed(comparison: Comparison, *judges: Judged, **options: Any) -> Listing:
    return list_cards(comparison, judges, **{"seed": 0, **options})


def gains(cards: list[Card]) -> list[float | None]:
    return [card.gain for card in cards]


def test_samples_are_extremes_random_ones_and_the_rest() -> None:
    listing = listed(*forty_prompts(), seed=3)
    assert list(listing.groups) == ["Largest gains", "Largest losses", "At random", REST]
    assert gains(listing.groups["Largest gains"]) == [19, 18, 17, 16, 15]
    assert gains(listing.groups["Largest losses"]) == [-20, -19, -18, -17, -16]
    assert len(listing.groups["At random"]) == 10
    rows = [card.row for group in listing.groups.values() for card in group]
    assert sorted(rows) == list(range(40))  # none is in two groups
    assert (listing.num_listed, listing.num_rows) == (40, 40)


def test_random_samples_depend_on_seed() -> None:
    a, b, c = (listed(*forty_prompts(), seed=seed).groups["At random"] for seed in (1, 1, 2))
    assert a == b != c


def test_card_has_prompt_responses_and_scores() -> None:
    best = listed(*forty_prompts()).groups["Largest gains"][0]
    i = GAINS.index(19.0)
    assert (best.row, best.prompt, best.gain, best.outcome, best.verdicts) == (i, f"prompt {i}", 19.0, "win", [])
    sft, policy = best.answers
    assert (sft.name, sft.tone, sft.text) == ("fine-tuned (SFT)", "sft", f"sft response {i}")
    assert (policy.name, policy.tone, policy.text) == ("PPO", "policy", f"ppo response {i}")
    # The rewards are half of the scores.
    assert sft.facts == "3 tokens, judge +100.00, reward +50.00"
    assert policy.facts == "3 tokens, judge +119.00, reward +59.50, KL 1.00"
    assert as_attributes(best) == {"row": i, "gain": "19", "outcome": "win", "length": 3, "kl": "1", "disagree": 0}


def test_facts_tell_the_end_and_one_token() -> None:
    c, judge = both_of([0.0, 1.0], [-1.0, 1.0], ppo_ends=[(1, True), (2, False)])
    first, second = sorted(listed(c, judge).groups["Largest gains"], key=lambda card: card.row)
    assert first.answers[1].facts == "1 token, cut off, judge \u22121.00, reward \u22120.50, KL 1.00"
    assert [first.outcome, second.outcome] == ["loss", "tie"]


@pytest.mark.parametrize("size", [1, 4, 10, 11])
def test_samples_of_few_prompts(size: int) -> None:
    groups = listed(*both_of([0.0] * size, [float(i) for i in range(size)])).groups
    assert len(groups["Largest gains"]) == min(size, 5)
    assert len(groups.get("Largest losses", [])) == min(max(size - 5, 0), 5)
    assert len(groups.get("At random", [])) == max(size - 10, 0)


def test_judge_that_cannot_tell_has_no_gains() -> None:
    c, _ = forty_prompts()
    listing = listed(c, pairwise_of([NAN] * 40, error="it is down"))
    assert list(listing.groups) == ["At random", REST]
    assert {card.gain for group in listing.groups.values() for card in group} == {None}
    assert {card.outcome for card in listing.groups[REST]} == {""}
    few = listed(comparison_of([0.0], [1.0]), pairwise_of([NAN], error="it is down"))
    assert list(few.groups) == ["At random"]


def test_other_policy_is_shown_too() -> None:
    c, judge = both_of([0.0], [1.0])
    (card,) = listed(c, judge, rival=("DPO", ["another response"])).groups["Largest gains"]
    assert [(a.name, a.tone, a.text) for a in card.answers[2:]] == [("DPO", "rival", "another response")]


def test_list_has_a_limit_of_rows_and_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    c, judge = forty_prompts()
    monkeypatch.setattr(cards, "MAX_LISTED", 25)
    assert listed(c, judge).num_listed == 25
    monkeypatch.setattr(cards, "MAX_LISTED_CHARS", 0)  # the selected ones are always shown
    listing = listed(c, judge)
    assert (listing.num_listed, listing.num_rows, REST in listing.groups) == (20, 40, False)


def test_gains_of_a_judge_without_scores_are_its_wins() -> None:
    assert gains_of(pairwise_of([1.0, 0.0, 0.5, NAN, 0.75])) == [1.0, -1.0, 0.0, 0.0, 0.5]
    assert gains_of(judged_of([1.0, 2.0], [3.0, 1.5])) == [2.0, -0.5]


def test_disagreements_are_rows_with_wins_and_losses() -> None:
    rest = [0.5] * 13
    first = pairwise_of([1.0, 1.0, 0.5, NAN, 0.0, 0.75, 0.0, *rest], name="a")
    second = pairwise_of([0.0, 1.0, 0.0, 0.0, 1.0, 0.25, 0.0, *rest], name="b")
    third = pairwise_of([0.5, 0.5, 1.0, 0.0, NAN, 0.5, 0.5, *rest], name="c")
    assert choose_disagreements([first, second], seed=0) == [0, 4, 5]
    assert choose_disagreements([first, second, third], seed=0) == [0, 2, 4, 5]
    assert choose_disagreements([first], seed=0) == []
    listing = listed(comparison_of([0.0] * 20, [0.0] * 20), first, second, third)
    shown = listing.groups["Where judges disagree"]
    assert [card.row for card in shown] == [0, 2, 4, 5] and all(card.disagree for card in shown)
    assert [[preferred for _, preferred in card.verdicts] for card in shown] == [
        ["PPO", "SFT", "tie"],
        ["tie", "SFT", "PPO"],
        ["SFT", "PPO", "no answer"],
        ["PPO", "SFT", "tie"],
    ]
    assert [name for name, _ in shown[0].verdicts] == ["a", "b", "c"]
    assert listing.num_listed == 20


def test_ten_disagreements_are_shown_by_seed() -> None:
    judges = [pairwise_of([1.0] * 40, name="a"), pairwise_of([0.0] * 40, name="b")]
    a, b, c = (choose_disagreements(judges, seed=seed) for seed in (1, 1, 2))
    assert len(set(a)) == 10
    assert a == b != c
