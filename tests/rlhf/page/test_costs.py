from pathlib import Path

import jinja2
import pytest

from components.rlhf.page.costs import StageCost, complete, cost_table, costs_part
from components.rlhf.page.render import render, replace_part

SFT = StageCost(stage="sft", seconds=90.0, peak_gib=2.0, planned_gib=1.5, price=0.25)
PPO = StageCost(stage="ppo", seconds=3600.0, peak_gib=4.0, planned_gib=5.0, price=10.0)


def test_costs_are_added_up() -> None:
    head, rows = cost_table([SFT, PPO])
    assert head == ["stage", "time", "price", "planned, GiB", "measured, GiB", "planned / measured"]
    assert rows == [
        ["sft", "1:30", "0.25", "1.50", "2.00", "0.75"],
        ["ppo", "1:00:00", "10.00", "5.00", "4.00", "1.25"],
        ["all", "1:01:30", "10.25", "", "4.00", ""],
    ]


def test_what_is_unknown_is_left_out_and_said() -> None:
    head, rows = cost_table([StageCost(stage="judge"), StageCost(stage="sft", seconds=60.0)])
    assert head == ["stage", "time"]
    assert rows == [["judge", ""], ["sft", "1:00"], ["all that is known", "1:00"]]
    assert "Nothing was measured." in costs_part([], is_complete=False)


PAGE = "<p>a</p><!-- costs -->old<!-- /costs --><p>b</p><!-- settings --><!-- /settings --><p>c</p>"


def test_report_is_completed_with_all_costs_and_parameters() -> None:
    page = complete(PAGE, [SFT, PPO], "seed: 0\nname: <b>\\1</b>\n")
    assert "old" not in page
    assert "1:01:30" in page and "Time of each stage of this run" in page
    assert "seed: 0\nname: &lt;b&gt;\\1&lt;/b&gt;\n" in page
    assert [page.index(f"<p>{letter}</p>") for letter in "abc"] == sorted(page.index(f"<p>{x}</p>") for x in "abc")
    assert complete(page, [SFT], "seed: 1") != page  # it can be completed again
    assert complete("a page of another version", [SFT], "") == "a page of another version"


def test_part_is_replaced_as_it_is() -> None:
    assert replace_part("<!-- x -->1<!-- /x --><!-- y -->2<!-- /y -->", "y", r"\g<0>") == (
        r"<!-- x -->1<!-- /x --><!-- y -->\g<0><!-- /y -->"
    )


def test_missing_value_of_a_template_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('{% extends "base.html" %}{% block title %}{{ name }}{% endblock %}')
    assert "<title>&lt;b&gt;</title>" in render(tmp_path / "page.html", name="<b>")
    with pytest.raises(jinja2.UndefinedError):
        render(tmp_path / "page.html")
