"""The comparison for people: a page with a table, a picture and samples, and the same table as Markdown."""

import io
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from components.evaluation.compare import Comparison
from components.evaluation.table import table_rows
from components.evaluation.verdict import Decision

SAMPLES_EACH, NUM_RANDOM = 5, 10


def as_markdown(numbers: Mapping[str, float], verdict: Decision) -> str:
    lines = [f"# {verdict.decision.capitalize()}", "", f"{verdict.reason}.", "", "| | SFT | PPO |", "|---|---:|---:|"]
    lines += [f"| {row['name']} | {row['sft']} | {row['ppo']} |" for row in table_rows(numbers)]
    return "\n".join(lines) + "\n"


def as_html(
    comparison: Comparison,
    numbers: Mapping[str, float],
    verdict: Decision,
    *,
    accuracy: Mapping[str, float],
    seed: int,
) -> str:
    """A self-contained page. accuracy holds the judge's and the reward_model's agreement with people on held-out pairs."""
    template = jinja2.Environment(autoescape=True).from_string(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    )
    return template.render(
        numbers=numbers,
        verdict=verdict,
        rows=table_rows(numbers),
        accuracy=accuracy,
        plot=_plot(comparison),
        groups=choose_samples(comparison, seed=seed),
        samples_each=SAMPLES_EACH,
        num_random=NUM_RANDOM,
    )


def choose_samples(comparison: Comparison, *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Pairs of responses by rule: largest gains, largest losses, and a seeded random choice of the others."""
    gains = [p - s for p, s in zip(comparison.ppo.judge_scores, comparison.sft.judge_scores, strict=True)]
    order = sorted(range(len(gains)), key=lambda i: gains[i], reverse=True)
    middle = order[SAMPLES_EACH:-SAMPLES_EACH]
    chosen = {
        "Largest gains": order[:SAMPLES_EACH],
        "Largest losses": order[-SAMPLES_EACH:][::-1],
        "At random": random.Random(seed).sample(middle, min(NUM_RANDOM, len(middle))),
    }
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
        for group, rows in chosen.items()
    }


def _plot(comparison: Comparison) -> str:
    """Judge against reward model, per prompt and model; and the two distributions of the judge's score."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for side, colour, label in ((comparison.sft, "#9ca3af", "SFT"), (comparison.ppo, "#2563eb", "PPO")):
        left.hist(side.judge_scores, bins=30, alpha=0.65, color=colour, label=label)
        right.scatter(side.rewards, side.judge_scores, s=7, alpha=0.5, color=colour, label=label)
    left.set_xlabel("judge's score")
    left.set_ylabel("prompts")
    right.set_xlabel("reward model's score")
    right.set_ylabel("judge's score")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
