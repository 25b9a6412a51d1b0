"""The metrics of a run as a self-contained HTML page of small charts, without scripts or network access."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from components.dpo.metrics import History
from components.rlhf.config.dpo import DpoConfig
from components.rlhf.page.charts import SHAPES, Series, line_chart
from components.rlhf.page.picture import picture
from components.rlhf.page.render import render

# Title of each panel, and its metrics with their labels.
PANELS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("loss", {"loss": ""}),
    ("accuracy", {"accuracy": ""}),
    ("margin of the rewards", {"margin": ""}),
    ("rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("log-prob (nats per answer)", {"logprobs/chosen": "chosen", "logprobs/rejected": "rejected"}),
    ("KL to SFT (nats per answer)", {"kl": "of the answers", "kl/mismatched": "of mismatched answers (kto)"}),
    ("gradient norm", {"grad_norm": ""}),
    ("learning rate", {"learning_rate": ""}),
)
TONES = ("policy", "reward")
SMOOTHED = 20  # a curve has as many means as this, over which the noise of single steps is small


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The chart of some metrics over the steps; legend has the label and color of each line, if there are several."""

    title: str
    chart: Markup
    legend: Sequence[tuple[str, str]]


def panels_of(history: History) -> list[Panel]:
    """The panels of all metrics that there are: means over neighbors, at their middles."""
    panels = []
    for title, names in PANELS:
        curves = {name: means([(row["step"], row[name]) for row in history if name in row], SMOOTHED) for name in names}
        curves = {name: points for name, points in curves.items() if points}
        if not curves:
            continue
        steps = sorted({step for points in curves.values() for step, _ in points})
        lines = [
            Series(name=names[name] or title.partition(" (")[0], values=[dict(points).get(x) for x in steps], tone=tone)
            for (name, points), tone in zip(curves.items(), TONES, strict=False)
        ]
        decimals = 8 if title == "learning rate" else 3
        chart = line_chart(
            f"{title} over the steps", steps, lines, x_label="step", decimals=decimals, include=[0.0, 1.0] if title == "accuracy" else []
        )  # fmt: skip
        panels.append(Panel(title=title, chart=chart, legend=[(line.name, line.tone) for line in lines]))
    return panels


def means(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """The means of at most count groups of neighbors, each at its middle."""
    size = math.ceil(len(points) / count) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def as_picture(history: History) -> str:
    """All panels as one SVG."""
    return picture([(panel.title, panel.chart, panel.legend) for panel in panels_of(history)])


def as_html(history: History, numbers: Mapping[str, float], dpo: DpoConfig) -> str:
    unit = "pairs" if dpo.is_paired else "labeled answers"
    facts = f"Loss {dpo.loss}, beta {dpo.strength:g}; {len(history)} steps of {dpo.batch_size} {unit}."
    if "num_heldout_pairs" in numbers:
        facts += (
            f" Of {numbers['num_heldout_pairs']:.0f} held-out pairs {numbers['heldout_accuracy']:.1%} are in the right order, with a "
            f"margin of {numbers['heldout_margin']:.3f}."
        )
    return render(
        Path(__file__).with_name("report.html"),
        facts=facts,
        panels=panels_of(history),
        smoothed=SMOOTHED,
        shapes=SHAPES,
    )
