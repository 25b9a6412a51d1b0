import pytest

from components.rlhf.data.examples import Unusable
from components.rlhf.data.tally import Tally
from components.rlhf.text.errors import InputError


def tally(read: int, kept: int, **dropped: int) -> Tally:
    """A tally with defects by reason; `duplicate` and `tie` are none."""
    out = Tally(name="data.prompts (p.jsonl)", read=read, kept=kept)
    for reason, number in dropped.items():
        for line in range(number):
            out.drop(
                Unusable(reason, f"why {reason} {line}.", is_defect=reason not in ("duplicate", "tie")),
                f"p.jsonl:{line}",
            )
    return out


@pytest.mark.parametrize(
    "usable",
    [tally(10, 8, empty=2), tally(160, 40, duplicate=120), tally(10, 1, tie=8, empty=1), tally(1, 1)],
)
def test_80_percent_without_defect_is_enough(usable: Tally) -> None:
    usable.require_usable()


def test_error_has_the_three_commonest_reasons_with_an_example_of_each() -> None:
    with pytest.raises(InputError) as caught:
        tally(100, 70, long=12, empty=10, odd=5, rare=3).require_usable()
    assert str(caught.value) == (
        "data.prompts (p.jsonl): only 70 of 100 records are usable, at least 80% must be: "
        "12 long (for example p.jsonl:0: why long 0); 10 empty (for example p.jsonl:0: why empty 0); "
        "5 odd (for example p.jsonl:0: why odd 0)."
    )


def test_source_without_records_is_rejected() -> None:
    with pytest.raises(InputError, match=r"data.prompts \(p.jsonl\) has no records; correct the path or the data"):
        tally(0, 0).require_usable()


def test_source_of_which_nothing_is_kept_is_rejected() -> None:
    with pytest.raises(InputError, match=r"10 tie \(for example p.jsonl:0: why tie 0\)"):
        tally(10, 0, tie=10).require_usable()
