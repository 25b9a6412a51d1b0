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


def test_kept_records_are_unchanged_and_in_order() -> None:
    kept, counts = clean("x", prompts(" b ", "a", "a b"))
    assert [record.prompt for record in kept] == [" b ", "a", "a b"]
    assert counts == {"read": 3, "kept": 3}


def test_drops_are_counted_by_reason() -> None:
    records = [
        *(pair(f"p{number}", "good", "bad") for number in range(16)),
        pair("p1", "good", "bad", margin=2.0),  # the same texts with another margin
        pair("p1", " good\n", "bad"),  # the same texts except for whitespace
        pair("p", "same", " same "),
        pair("p", "good", " \n"),
    ]
    kept, counts = clean("x", records)
    assert kept == records[:16]
    expected = {"read": 20, "kept": 16, "dropped_duplicate": 2, "dropped_chosen_equals_rejected": 1, "dropped_empty": 1}
    assert counts == expected


def test_swapped_pair_is_not_a_duplicate() -> None:
    assert len(clean("x", [pair("p", "a", "b"), pair("p", "b", "a")])[0]) == 2


def test_same_prompt_with_another_completion_is_not_a_duplicate() -> None:
    records = [Demonstration(prompt="p", completion=text) for text in ("a", "b")]
    assert clean("x", records)[0] == records


def test_text_rated_twice_is_a_duplicate() -> None:
    records = [RatedText(prompt=f"p{number}", completion="c", rating=1.0) for number in range(4)]
    kept, counts = clean("x", [*records, RatedText(prompt="p0", completion="c", rating=-1.0)])
    assert kept == records
    assert counts["dropped_duplicate"] == 1


@pytest.mark.parametrize("empty", [pair(" ", "a", "b"), pair("p", "", "b"), pair("p", "a", "\t")])
def test_pair_with_an_empty_text_is_dropped(empty: PreferencePair) -> None:
    kept, counts = clean("x", [*(pair(f"p{n}", "a", "b") for n in range(4)), empty])
    assert len(kept) == 4
    assert counts["dropped_empty"] == 1


@pytest.mark.parametrize("usable", [4, 8, 12, 16, 28, 400])
def test_exactly_80_percent_usable_is_accepted(usable: int) -> None:
    """Floating point must not reject exactly 0.8 of any multiple of 5."""
    assert len(clean("x", good(usable) + prompts(*[""] * (usable // 4)))[0]) == usable


def test_less_than_80_percent_usable_is_rejected_with_reasons() -> None:
    with pytest.raises(InputError) as caught:
        clean("data.prompts (p.jsonl)", good(7) + prompts("", "", "prompt 1"))
    assert str(caught.value) == (
        "data.prompts (p.jsonl): only 7 of 10 records are usable (2 empty, 1 duplicate); at least 80% must be. "
        "Correct the data, or columns in the params file."
    )


def test_empty_source_is_rejected() -> None:
    with pytest.raises(InputError, match=r"x: only 0 of 0 records are usable \(the source is empty\)"):
        clean("x", prompts())
