import re
import xml.etree.ElementTree as ET
from unittest import mock

from components.ppo import curves
from components.ppo.curves import PANELS, as_html, as_svg
from components.ppo.guard import Event
from components.ppo.keep import Outcome
from components.ppo.validation import Evaluation
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.config.rollout import RolloutConfig

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


def test_page_is_self_contained() -> None:
    page = as_html(history(4, evals=True), PPO)
    # The names of XML namespaces and vocabularies look like addresses; nothing fetches them.
    fetched = re.findall(r"""(?:src|href|data|action)\s*=\s*["'](?!#)([^"']*)|url\((?!#)([^)]*)\)|@import""", page)
    assert fetched == []
    assert not re.search(r"<(script|link|iframe|object|embed|img)\b", page)
    svg = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    assert ET.fromstring(svg).tag.endswith("svg")


def test_page_describes_the_run() -> None:
    page = as_html(history(4), PPO)
    assert page.startswith("<!doctype html>")
    assert "4 iterations of 32 responses; score 1.00 to 4.00, KL 8.00 nats per response, KL coefficient 0.0625." in page


def test_every_panel_is_drawn_with_its_title() -> None:
    svg = as_svg(history(3))
    assert len(re.findall(r'<g id="axes_\d+"', svg)) == len(PANELS) == 9
    for _, title in PANELS:
        assert f"<!-- {title} -->" in svg


def test_validation_passes_are_drawn_as_points() -> None:
    assert "validation prompts" not in as_svg(history(4))
    assert "validation prompts" in as_svg(history(4, evals=True))


def test_metrics_that_the_run_does_not_have_get_no_panel() -> None:
    rows = [
        {name: value for name, value in row.items() if not name.startswith(("value/", "loss/value"))}
        for row in history(3)
    ]
    svg = as_svg(rows)
    assert len(re.findall(r'<g id="axes_\d+"', svg)) == 7
    assert "explained variance" not in svg


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
    for label in ("exported: iteration 2", "guard: rollout turned down", "limit of the KL (5)", "validation objective"):
        assert page.count(f"<!-- {label}") == 1, label  # in the legend
    assert "score 1.00 to 2.00" in page
    plain = as_html(history(3), PPO)
    assert "exported" not in plain and "guard" not in plain.lower()


def test_marks_are_at_their_iterations() -> None:
    figures = []
    plain = curves.plt.close
    with mock.patch.object(curves.plt, "close", lambda figure: figures.append(figure)):
        as_svg(history(4), OUTCOME)
    score, kl = figures[0].axes[:2]
    vertical = {line.get_label(): line.get_xdata()[0] for line in score.lines if len(set(line.get_xdata())) == 1}
    assert vertical["exported: iteration 2"] == 2 and vertical["guard: rollout turned down"] == 3
    limit = next(line for line in kl.lines if line.get_label().startswith("limit"))
    assert list(limit.get_ydata()) == [5.0, 5.0]
    assert not any(line.get_label().startswith("limit") for line in score.lines)
    plain(figures[0])


def test_one_iteration_can_be_plotted() -> None:
    assert "<svg" in as_html(history(1), PPO)
