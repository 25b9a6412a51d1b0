import pytest

from components.rlhf.data.clean import clean
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText
from components.rlhf.text.errors import InputError


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(prompt=text) for text in texts]


def good(count: int) -> list[Prompt]:
    return prompts(*(f"prompt {number}" for number in range(count)))


def pair(prompt: str, chosen: str, rejected: str, margin: float | None = None) -> PreferencePair:
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin)


def test_what_is_kept_keeps_its_order_and_its_spaces() -> None:
    kept, counts = clean("x", prompts(" b ", "a", "a b"))
    assert [record.prompt for record in kept] == [" b ", "a", "a b"]
    assert counts == {"read": 3, "kept": 3}


def test_every_reason_is_counted() -> None:
    records = [
        *(pair(f"p{number}", "good", "bad") for number in range(16)),
        pair("p1", "good", "bad", margin=2.0),  # the same texts, whatever the margin
        pair("p1", " good\n", "bad"),  # the same texts, white space aside
        pair("p", "same", " same "),
        pair("p", "good", " \n"),
    ]
    kept, counts = clean("x", records)
    assert kept == records[:16]
    expected = {"read": 20, "kept": 16, "dropped_duplicate": 2, "dropped_chosen_equals_rejected": 1, "dropped_empty": 1}
    assert counts == expected


def test_a_pair_the_other_way_round_is_another_opinion() -> None:
    assert len(clean("x", [pair("p", "a", "b"), pair("p", "b", "a")])[0]) == 2


def test_one_prompt_with_two_completions_is_no_duplicate() -> None:
    records = [Demonstration(prompt="p", completion=text) for text in ("a", "b")]
    assert clean("x", records)[0] == records


def test_a_text_rated_twice_is_one_text() -> None:
    records = [RatedText(prompt=f"p{number}", completion="c", rating=1.0) for number in range(4)]
    kept, counts = clean("x", [*records, RatedText(prompt="p0", completion="c", rating=-1.0)])
    assert kept == records
    assert counts["dropped_duplicate"] == 1


@pytest.mark.parametrize("empty", [pair(" ", "a", "b"), pair("p", "", "b"), pair("p", "a", "\t")])
def test_any_empty_text_spoils_a_pair(empty: PreferencePair) -> None:
    kept, counts = clean("x", [*(pair(f"p{n}", "a", "b") for n in range(4)), empty])
    assert len(kept) == 4
    assert counts["dropped_empty"] == 1


@pytest.mark.parametrize("usable", [4, 8, 12, 16, 28, 400])
def test_exactly_four_fifths_is_enough(usable: int) -> None:
    """At 0.8 of any multiple of 5, floating point must not tip the balance."""
    assert len(clean("x", good(usable) + prompts(*[""] * (usable // 4)))[0]) == usable


def test_less_than_four_fifths_is_refused_with_the_reasons() -> None:
    with pytest.raises(InputError) as caught:
        clean("data.prompts (p.jsonl)", good(7) + prompts("", "", "prompt 1"))
    assert str(caught.value) == (
        "data.prompts (p.jsonl): only 7 of 10 records are usable (2 empty, 1 duplicate); at least 80% must be. "
        "Correct the data, or its columns in the params file."
    )


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(InputError, match=r"x: only 0 of 0 records are usable \(the source is empty\)"):
        clean("x", prompts())
