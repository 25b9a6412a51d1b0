"""The picture of reward and judge over the KL that MLflow shows."""

from xml.etree import ElementTree

import pytest

from components.evaluation.over_kl import reward_and_judge_over_kl

ROWS = [{"iteration": float(n), "reward": -0.5 + n, "judge_score": 5.0 - n, "kl": 0.3 * n} for n in (0, 2, 4)]


@pytest.mark.parametrize(("names", "panels"), [(("reward", "judge_score"), 2), (("reward",), 1)])
def test_picture_has_a_panel_for_each_score_and_a_point_for_each_pass(names: tuple[str, ...], panels: int) -> None:
    rows = [{key: row[key] for key in ("iteration", "kl", *names)} for row in ROWS]
    picture = ElementTree.fromstring(reward_and_judge_over_kl(rows))
    groups = [group.get("id") or "" for group in picture.iter("{http://www.w3.org/2000/svg}g")]
    assert sum(group.startswith("axes_") for group in groups) == panels
    comments = reward_and_judge_over_kl(rows)
    assert comments.count("<!-- iteration 0 -->") == comments.count("<!-- iteration 4 -->") == panels
    assert "<!-- iteration 2 -->" not in comments


@pytest.mark.parametrize("rows", [[], ROWS[:1], [{"iteration": 0.0, "kl": 0.0}, {"iteration": 1.0, "kl": 1.0}]])
def test_no_picture_without_two_passes_or_scores(rows: list[dict[str, float]]) -> None:
    assert reward_and_judge_over_kl(rows) == ""
