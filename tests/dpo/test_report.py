import re

from components.dpo.report import PANELS, as_html, means, panels_of
from components.rlhf.config.dpo import DpoConfig
from tests.support.html_page import check_structure, parse


def history(length: int, **more: float) -> list[dict[str, float]]:
    names = [name for _, metrics in PANELS for name in metrics if name != "kl/mismatched"]
    return [{"step": float(step), **{name: float(step) for name in names}, **more} for step in range(1, length + 1)]


def test_curves_are_means_over_neighbors() -> None:
    assert means([(1, 10.0), (2, 20.0), (3, 30.0)], 2) == [(1.5, 15.0), (3, 30.0)]
    panels = {panel.title: panel for panel in panels_of(history(40))}
    loss = re.sub("<[^>]*>", " ", panels["loss"].chart)
    assert "loss 1.500" in loss and "loss 39.500" in loss and "loss 2.000" not in loss
    assert panels["loss"].chart.count('class="point') == 20


def test_panels_of_the_metrics_that_there_are() -> None:
    assert [panel.title for panel in panels_of(history(3))] == [title for title, _ in PANELS]
    rows = [{"step": 1.0, "loss": 0.5}, {"step": 2.0, "loss": 0.25, "kl/mismatched": 3.0}]
    loss, kl = panels_of(rows)
    assert (loss.title, kl.title) == ("loss", "KL to SFT (nats per answer)")
    assert kl.legend == [("of mismatched answers (kto)", "policy")]
    rewards = next(panel for panel in panels_of(history(3)) if panel.title == "rewards")
    assert rewards.legend == [("chosen", "policy"), ("rejected", "reward")]


def test_page_is_self_contained_and_describes_the_run() -> None:
    numbers = {"num_heldout_pairs": 40.0, "heldout_accuracy": 0.75, "heldout_margin": 0.125}
    page = as_html(history(3), numbers, DpoConfig(batch_size=8))
    root = parse(page)
    check_structure(root)
    assert not re.search(r"<script|(?:src|href)\s*=\s*[\"'](?!#)|https?:|@import", page)
    assert "3 steps of 8 pairs. Of 40 held-out pairs 75.0% are in the right order, with a margin of 0.125." in root.text
    assert "held-out" not in as_html(history(1), {}, DpoConfig())
