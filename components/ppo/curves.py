"""The metrics of a run as a self-contained HTML page of small plots, without scripts or network access."""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from components.ppo.keep import Outcome
from components.rlhf.config.ppo import PpoConfig

Row = dict[str, float]
PANELS = (
    ("score/mean", "score (mean of the rollout)"),
    ("kl/sequence", "KL to SFT (nats per response)"),
    ("entropy", "entropy (nats per token)"),
    ("response/length", "response length (tokens)"),
    ("response/eos_rate", "EOS rate"),
    ("actor/clip_fraction", "clip fraction"),
    ("loss/value", "value loss"),
    ("value/explained_variance", "explained variance of the critic"),
    ("actor/grad_norm", "actor gradient norm"),
)
ROLLOUT, VALIDATION, OBJECTIVE, KEPT, GUARD = "#2563eb", "#f97316", "#7c3aed", "#15803d", "#b91c1c"


def as_svg(history: Sequence[Row], outcome: Outcome | None = None) -> str:
    """The panels of all metrics that there are over the iterations, as inline SVG. What a row does not have is a gap."""
    outcome = outcome or Outcome()
    panels = [(name, title) for name, title in PANELS if any(name in row for row in history)]
    num_rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(num_rows, 3, figsize=(12, 0.5 + 2.5 * num_rows), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, title) in zip(axes.flat, panels, strict=False):
        xs, ys = [row["iteration"] for row in history], [row.get(name, math.nan) for row in history]
        axis.plot(xs, ys, color=ROLLOUT, linewidth=1.6, label="rollout")
        evals = [row for row in history if f"validation/{name}" in row]
        if evals:
            xs, ys = [row["iteration"] for row in evals], [row[f"validation/{name}"] for row in evals]
            axis.plot(xs, ys, "o", color=VALIDATION, markersize=4, label="validation prompts")
        _mark(axis, name, outcome)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("iteration", fontsize=8)
    labels = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(labels) > 1:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)


def _mark(axis: Any, name: str, outcome: Outcome) -> None:
    """The kept iteration and the guard's events in every panel, the objective beside the score, and the limit of the KL."""
    if name == "score/mean" and outcome.evaluations:
        xs, ys = [e.iteration for e in outcome.evaluations], [e.objective for e in outcome.evaluations]
        axis.plot(
            xs, ys, "D", color=OBJECTIVE, markersize=3.5, label="validation objective (reward minus kl_coef x KL)"
        )
    if name == "kl/sequence" and outcome.max_kl is not None:
        axis.axhline(
            outcome.max_kl, color=GUARD, linestyle=":", linewidth=1.2, label=f"limit of the KL ({outcome.max_kl:g})"
        )
    for event in outcome.events:
        axis.axvline(event.iteration, color=GUARD, linewidth=1, label="guard: rollout turned down")
    if outcome.reason:
        axis.axvline(
            outcome.iteration,
            color=KEPT,
            linestyle="--",
            linewidth=1.2,
            label=f"exported: iteration {outcome.iteration}",
        )


def as_html(history: Sequence[Row], ppo: PpoConfig, outcome: Outcome | None = None) -> str:
    scored = [row for row in history if "score/mean" in row]
    facts = (
        f"{len(history)} iterations of {ppo.rollout.num_prompts * ppo.rollout.samples_per_prompt} responses; "
        f"score {scored[0]['score/mean']:.2f} to {scored[-1]['score/mean']:.2f}, KL {scored[-1]['kl/sequence']:.2f} nats per response, "
        f"KL coefficient {history[-1]['kl/coef']:.3g}."
    )
    notes = [f"{text[0].upper()}{text[1:]}." for text in _notes(outcome)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>PPO</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}"
        "svg{width:100%;height:auto}</style>"
        f"<h1>PPO</h1><p>{html.escape(facts)}</p>{''.join(f'<p>{html.escape(note)}</p>' for note in notes)}"
        f"{as_svg(history, outcome)}"
        "<p>components/ppo/README.md explains each metric and how a healthy run looks.</p></html>"
    )


def _notes(outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return []
    return [outcome.sentence, *(f"guard, {event}" for event in outcome.events)]
