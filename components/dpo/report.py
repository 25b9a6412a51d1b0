"""The metrics of a run as a self-contained HTML page of small plots, without scripts or network access."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from components.dpo.metrics import History
from components.rlhf.config.dpo import DpoConfig

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
COLORS = ("#2563eb", "#f97316")
SMOOTHED = 20  # a curve has as many means as this, over which the noise of single steps is small


def as_svg(history: History) -> str:
    """The panels of all metrics that there are over the steps, as inline SVG: every step thin, means over neighbors thick."""
    panels = [(title, names) for title, names in PANELS if any(name in row for row in history for name in names)]
    num_rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(num_rows, 3, figsize=(12, 0.5 + 2.5 * num_rows), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for (name, label), color in zip(names.items(), COLORS, strict=False):
            points = [(row["step"], row[name]) for row in history if name in row]
            axis.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.35) if points else None
            smooth = means(points, SMOOTHED)
            axis.plot(*zip(*smooth, strict=True), color=color, linewidth=1.6, label=label or None) if smooth else None
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(fontsize=7, frameon=False)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)


def means(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """The means of at most count groups of neighbors, each at its middle."""
    size = math.ceil(len(points) / count) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def as_html(history: History, numbers: Mapping[str, float], dpo: DpoConfig) -> str:
    unit = "pairs" if dpo.is_paired else "labeled answers"
    facts = f"Loss {dpo.loss}, beta {dpo.strength:g}; {len(history)} steps of {dpo.batch_size} {unit}."
    if "num_heldout_pairs" in numbers:
        facts += (
            f" Of {numbers['num_heldout_pairs']:.0f} held-out pairs {numbers['heldout_accuracy']:.1%} are in the right order, with a "
            f"margin of {numbers['heldout_margin']:.3f}."
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>DPO</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}"
        "svg{width:100%;height:auto}</style>"
        f"<h1>DPO</h1><p>{html.escape(facts)}</p>{as_svg(history)}"
        "<p>components/dpo/README.md explains each metric and how a healthy run looks.</p></html>"
    )
