import re

from components.ppo.curves import PANELS, as_html, as_picture, panels_of
from components.ppo.guard import Event
from components.ppo.keep import Outcome
from components.ppo.validation import Evaluation
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.config.rollout import RolloutConfig
from tests.support.html_page import check_structure, parse

PPO = PpoConfig(rollout=RolloutConfig(num_prompts=16, samples_per_prompt=2))


def history(length: int, *, evals: bool = False) -> list[dict[str, float]]:
    rows = []
    for iteration in range(1, length + 1):
        row = {name: float(iteration * (1 + number)) for number, (name, _) in enumerate(PANELS)}
        row |= {"iteration": float(iteration), "kl/coef": 0.0625}
        if evals and iteration % 2 == 0:
            row["validation/score/mean"] = float(iteration)
        rows.append(row)
    return rows


def test_page_is_self_contained_and_well_formed() -> None:
    page = as_html(history(4, evals=True), PPO)
    root = parse(page)
    check_structure(root)
    assert not {element.tag for element in root.all()} & {"script", "link", "iframe", "object", "embed", "img"}
    assert not re.search(r"""(?:src|href|data|action)\s*=\s*["'](?!#)|url\((?!#)|@import|https?:""", page)


def test_page_describes_the_run() -> None:
    page = as_html(history(4), PPO)
    assert page.startswith("<!doctype html>")
    assert "4 iterations of 32 responses; score 1.00 to 4.00, KL 8.00 nats per response, KL coefficient 0.0625." in page


def test_every_metric_has_a_panel_with_its_title() -> None:
    panels = panels_of(history(3))
    assert [panel.title for panel in panels] == [title for _, title in PANELS] and len(PANELS) == 9
    # The score is 1, 2, 3, its axis goes from 1 to 3.
    assert 'd="M44.0 182.0L194.0 100.0L344.0 18.0"' in panels[0].chart
    assert 'aria-label="score (mean of the rollout) over the iterations, from 1 to 3"' in panels[0].chart


def test_validation_passes_are_drawn_as_points() -> None:
    plain, validated = (panels_of(history(4, evals=evals))[0] for evals in (False, True))
    assert plain.legend == [("rollout", "policy")]
    assert validated.legend == [("rollout", "policy"), ("validation prompts", "reward")]
    assert validated.chart.count('class="point s-reward"') == 2 and 'class="line s-reward"' not in validated.chart
    assert "validation prompts 4.000" in re.sub("<[^>]*>", " ", validated.chart)


def test_picture_has_all_panels() -> None:
    picture = as_picture(history(3), OUTCOME)
    assert picture.count('aria-label="') == 9 and all(title in picture for _, title in PANELS)


def test_values_of_the_curves_are_in_a_table() -> None:
    (table,) = parse(as_html(history(3), PPO)).all("table")
    cells = [[cell.text for cell in row.all() if cell.tag in ("th", "td")] for row in table.all("tr")]
    assert cells[0][:3] == ["iteration", "score", "KL to SFT"]
    assert cells[2][:3] == ["2", "2", "4"]


def test_metrics_that_the_run_does_not_have_get_no_panel() -> None:
    rows = [
        {name: value for name, value in row.items() if not name.startswith(("value/", "loss/value"))}
        for row in history(3)
    ]
    assert len(panels_of(rows)) == 7
    assert "xplained variance" not in as_html(rows, PPO)


def test_metric_that_is_never_finite_has_an_empty_panel() -> None:
    rows = [row | {"loss/value": float("nan")} for row in history(2)]
    page = as_html(rows, PPO)
    assert "value loss over the iterations" in page and "nan nan" not in page


EVALUATION = Evaluation(iteration=2, objective=0.5, kl=4.0)
EVENT = Event(iteration=3, seen="loss/value is nan", returned_to=2, stops=True)
OUTCOME = Outcome(
    iteration=2, reason="the <best> one", kept=EVALUATION, evaluations=[EVALUATION], events=[EVENT], max_kl=5.0
)


def test_page_says_and_marks_what_was_exported_and_what_the_guard_did() -> None:
    rows = history(3, evals=True)
    rows[2] = {name: rows[2][name] for name in ("iteration", "kl/coef")}  # a rollout that could not be scored
    page = as_html(rows, PPO, OUTCOME)
    assert "<p>The exported policy is the policy after iteration 2: the &lt;best&gt; one.</p>" in page
    assert (
        "<p>Guard, iteration 3: loss/value is nan; back to the policy after iteration 2, and training stopped.</p>"
        in page
    )
    assert page.count(">exported</text>") == page.count(">rollout turned down</text>") == 9
    assert page.count(">at most 5</text>") == 1
    assert "The validation objective is the reward minus kl_coef x KL." in page
    assert "score 1.00 to 2.00" in page
    plain = as_html(history(3), PPO)
    assert "exported" not in plain and "guard" not in plain.lower()


def test_marks_are_at_their_iterations() -> None:
    score, kl = panels_of(history(4), OUTCOME)[:2]
    for panel in (score, kl):  # the axis goes from 1 to 4 over 300 pixels
        at = re.findall(r'class="mark" d="M([\d.]+) ', panel.chart)
        assert at == ["144.0", "244.0"]  # exported after iteration 2, turned down in iteration 3
    assert score.chart.count('class="point s-kl"') == 1 and "validation objective 0.500" in re.sub(
        "<[^>]*>", " ", score.chart
    )
    # Its KL is 2, 4, 6, 8, and its axis goes from 2 to 8; the limit is 5.
    assert re.findall(r'class="limit" d="M44.0 ([\d.]+)H', kl.chart) == ["100.0"] and 'class="limit"' not in score.chart


def test_one_iteration_can_be_plotted() -> None:
    assert "<svg" in as_html(history(1), PPO)
