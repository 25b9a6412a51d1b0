"""The report of the comparison: an HTML page with table, plots and samples, and the table as Markdown."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from components.evaluation.compare import Comparison
from components.evaluation.samples import NUM_EXTREMES, NUM_RANDOM, choose_rows
from components.evaluation.verdict import Decision
from components.rlhf.text.comparison_table import comparison_rows

TRAINING_PANELS = (
    ("reward", "reward model score"),
    ("judge_score", "judge score (not seen by PPO)"),
    ("kl", "KL (nats per response)"),
    ("eos_rate", "EOS rate"),
)


def as_markdown(numbers: Mapping[str, float], verdict: Decision) -> str:
    lines = [f"# {verdict.decision.capitalize()}", "", f"{verdict.reason}.", "", "| | SFT | PPO |", "|---|---:|---:|"]
    lines += [f"| {row['name']} | {row['sft']} | {row['ppo']} |" for row in comparison_rows(numbers)]
    return "\n".join(lines) + "\n"


def as_html(
    comparison: Comparison,
    numbers: Mapping[str, float],
    verdict: Decision,
    training: Sequence[Mapping[str, float]],
    *,
    seed: int,
) -> str:
    """A self-contained HTML page. training has one row per validation pass, and may be empty."""
    template = jinja2.Environment(autoescape=True).from_string(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    )
    return template.render(
        numbers=numbers,
        verdict=verdict,
        rows=comparison_rows(numbers),
        plot=_plot(comparison),
        training_plot=_training_plot(training) if training else "",
        groups=choose_samples(comparison, seed=seed),
        samples_each=NUM_EXTREMES,
        num_random=NUM_RANDOM,
    )


def choose_samples(comparison: Comparison, *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Selected pairs of responses, with the gain in judge score."""
    gains = [p - s for p, s in zip(comparison.ppo.judge_scores, comparison.sft.judge_scores, strict=True)]
    return {
        group: [
            {
                "prompt": comparison.prompts[i].prompt,
                "sft": comparison.sft.completions[i].response,
                "ppo": comparison.ppo.completions[i].response,
                "gain": gains[i],
            }
            for i in rows
        ]
        for group, rows in choose_rows(gains, seed=seed).items()
    }


def _plot(comparison: Comparison) -> str:
    """Histogram of the judge scores of both models, and scatter plot of judge score vs. reward model score per prompt."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for scored, color, label in ((comparison.sft, "#9ca3af", "SFT"), (comparison.ppo, "#2563eb", "PPO")):
        left.hist(scored.judge_scores, bins=30, alpha=0.65, color=color, label=label)
        right.scatter(scored.rewards, scored.judge_scores, s=7, alpha=0.5, color=color, label=label)
    left.set_xlabel("judge score")
    left.set_ylabel("prompts")
    right.set_xlabel("reward model score")
    right.set_ylabel("judge score")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return _as_svg(figure)


def _training_plot(training: Sequence[Mapping[str, float]]) -> str:
    """One plot of each metric in TRAINING_PANELS over the iterations."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.9), constrained_layout=True)
    for axis, (name, title) in zip(axes, TRAINING_PANELS, strict=True):
        axis.plot([r["iteration"] for r in training], [r[name] for r in training], "o-", color="#2563eb", markersize=4)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("iteration", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[3].set_ylim(-0.03, 1.03)
    return _as_svg(figure)


def _as_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
