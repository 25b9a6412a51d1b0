import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.page.scale import Scale, limits, number_text, tick_texts, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.02, 0.93, [0, 0.25, 0.5, 0.75, 1]),
        (-0.16, 0.87, [-0.5, 0, 0.5, 1]),
        (0, 14, [0, 5, 10, 15]),
        (0, 400, [0, 100, 200, 300, 400]),
        (1234, 5678, [0, 2000, 4000, 6000]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e6))
def test_ticks_contain_the_values_and_are_few(low: float, size: float) -> None:
    found = ticks(low, low + size)
    assert found[0] <= low + 1e-8 * size and found[-1] >= low + size * (1 - 1e-8)
    assert 2 <= len(found) <= 7
    assert all(a < b for a, b in itertools.pairwise(found))


def test_ticks_have_the_decimals_of_their_step() -> None:
    assert tick_texts([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_texts([-0.5, 0.0, 0.5]) == ["\u22120.5", "0.0", "0.5"]
    assert tick_texts([0, 2000, 4000]) == ["0", "2,000", "4,000"]


def test_zero_has_no_sign() -> None:
    assert number_text(-0.001, 2) == "0.00"
    assert number_text(-1234.5, 1) == "\u22121,234.5"


def test_limits_of_values_with_gaps() -> None:
    assert limits([3.0, None, 1.0, math.nan]) == (1.0, 3.0)
    assert limits([3.0], include=[0.0]) == (0.0, 3.0)
    assert limits([]) == (0.0, 1.0)
    assert limits([16.0, 16.0]) == (14.4, 17.6)  # a tenth of it on each side
    assert limits([0.0]) == (-0.5, 0.5)


def test_scale_is_linear() -> None:
    scale = Scale(low=10, high=20, start=100, end=0)
    assert [scale(10), scale(12.5), scale(20)] == [100, 75, 0]
