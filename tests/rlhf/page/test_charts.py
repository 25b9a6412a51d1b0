import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.page.charts import Marks, Series, bin_edges, count_in_bins, histogram, line_chart, scatter

HOSTILE = "<script>\"&'"


def texts_of(svg: str) -> list[str]:
    """All texts; the SVG is well-formed XML."""
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("text")]


def test_line_goes_through_its_points_and_has_gaps() -> None:
    series = Series(name="reward", values=[0.0, 1.0, None, 0.5], tone="reward")
    svg = line_chart("a label", [0, 10, 20, 30], [series], x_label="iteration")
    # The x axis has ticks 0, 10, 20, 30 from 44 to 344, the y axis 0 to 1 from 182 up to 18.
    assert 'class="line s-reward" d="M44.0 182.0L144.0 18.0M344.0 100.0"' in svg
    assert svg.count('class="point s-reward"') == 3
    assert svg.count('class="hit"') == 4
    assert 'role="img" aria-label="a label"' in svg
    assert "iteration 10reward 1.00" in texts_of(svg)
    assert "iteration 20" in texts_of(svg)  # a gap has no value


def test_marks_are_drawn_and_named() -> None:
    series = Series(name="kl", values=[0.0, 5.0], tone="kl")
    marks = Marks(x=[(5, "exported")], y=[(10, "limit")], region=(2.5, 10, "region"))
    svg = line_chart("", [0, 10], [series], x_label="x", marks=marks)
    assert {"exported", "limit", "region"} <= set(texts_of(svg))
    assert '<rect class="region" x="119.0" y="18.0" width="225.0" height="164.0"/>' in svg
    assert '<path class="mark" d="M194.0 18.0V182.0"/>' in svg
    assert '<path class="limit" d="M44.0 18.0H344.0"/>' in svg  # the axis contains it


def test_line_with_many_points_has_no_markers() -> None:
    series = Series(name="a", values=[float(i) for i in range(100)], tone="sft")
    assert 'class="point' not in line_chart("", range(100), [series], x_label="x")


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0], [None]])
def test_charts_of_few_values(values: list[float]) -> None:
    series = Series(name="a", values=values, tone="sft")
    for svg in (line_chart("", range(len(values)), [series], x_label="x"), histogram("", [series], x_label="x")):
        ET.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg


def test_texts_are_escaped() -> None:
    series = Series(name=HOSTILE, values=[0.0, 1.0], tone="sft")
    marks = Marks(x=[(0, HOSTILE)], y=[(1, HOSTILE)], region=(0, 1, HOSTILE))
    for svg in (
        line_chart(HOSTILE, [0, 1], [series], x_label=HOSTILE, marks=marks),
        histogram(HOSTILE, [series], x_label=HOSTILE),
        scatter(HOSTILE, [(1, 2)], x_label=HOSTILE, tone="sft", quadrant=HOSTILE),
    ):
        assert "<script" not in svg
        assert HOSTILE in " ".join(texts_of(svg))
        assert ET.fromstring(svg).attrib["aria-label"] == HOSTILE


def test_histogram_counts_values() -> None:
    a = Series(name="SFT", values=[0.0, 0.1, 0.9], tone="sft")
    b = Series(name="PPO", values=[1.0, 1.0], tone="policy")
    svg = histogram("", [a, b], x_label="score", num_bins=2)
    assert "0.00 to 0.50SFT 2PPO 0" in texts_of(svg)
    assert "0.50 to 1.00SFT 1PPO 2" in texts_of(svg)


def test_bins_of_whole_numbers_lie_between_them() -> None:
    assert bin_edges([3, 5], whole=True, num_bins=10) == [2.5, 3.5, 4.5, 5.5]
    assert bin_edges([0, 9], whole=True, num_bins=5) == [-0.5, 1.5, 3.5, 5.5, 7.5, 9.5]
    svg = histogram("", [Series(name="a", values=[0, 1, 9], tone="sft")], x_label="tokens", whole=True, num_bins=5)
    assert "0 to 1a 2" in texts_of(svg) and "8 to 9a 1" in texts_of(svg)
    single = histogram("", [Series(name="a", values=[3, 4], tone="sft")], x_label="tokens", whole=True)
    assert "3a 1" in texts_of(single)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.booleans())
def test_every_value_is_in_a_bin(values: list[float], whole: bool) -> None:
    values = [float(round(v)) for v in values] if whole else values
    edges = bin_edges(values, whole=whole, num_bins=24)
    assert len(edges) <= 25
    assert sum(count_in_bins(values, edges)) == len(values)


def test_scatter_shades_the_quadrant_in_which_only_x_rises() -> None:
    svg = scatter("", [(-1, 1), (1, -1)], x_label="x", tone="policy", quadrant="only x: 50%")
    # Both axes go from -1 to 1, so that 0 is at 194 and 100.
    assert '<rect class="region" x="194.0" y="100.0" width="150.0" height="82.0"/>' in svg
    assert re.search(r'class="dots s-policy" d="M44\.0 18\.0h0M344\.0 182\.0h0"', svg)
