"""The metrics of a run as a self-contained HTML page of small charts, without scripts or network access."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from components.ppo.keep import Outcome
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.page.charts import SHAPES, Marks, Series, line_chart
from components.rlhf.page.picture import picture
from components.rlhf.page.render import render

Row = dict[str, float]
SCORE, KL = "score/mean", "kl/sequence"
PANELS = (
    (SCORE, "score (mean of the rollout)"),
    (KL, "KL to SFT (nats per response)"),
    ("entropy", "entropy (nats per token)"),
    ("response/length", "response length (tokens)"),
    ("response/eos_rate", "EOS rate"),
    ("actor/clip_fraction", "clip fraction"),
    ("loss/value", "value loss"),
    ("value/explained_variance", "explained variance of the critic"),
    ("actor/grad_norm", "actor gradient norm"),
)
EXPORTED, REFUSED = "exported", "rollout turned down"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The chart of a metric over the iterations; legend has the name and color of each line, if there are several."""

    title: str
    chart: Markup
    legend: Sequence[tuple[str, str]]


def panels_of(history: Sequence[Row], outcome: Outcome | None = None) -> list[Panel]:
    """The panels of all metrics that there are. What a row does not have is a gap."""
    outcome = outcome or Outcome()
    iterations = [row["iteration"] for row in history]
    panels = []
    for name, title in PANELS:
        if not any(name in row for row in history):
            continue
        lines = [Series(name="rollout", values=[row.get(name) for row in history], tone="policy")]
        if any(f"validation/{name}" in row for row in history):
            values = [row.get(f"validation/{name}") for row in history]
            lines.append(Series(name="validation prompts", values=values, tone="reward", has_line=False))
        if name == SCORE and outcome.evaluations:
            objective = {evaluation.iteration: evaluation.objective for evaluation in outcome.evaluations}
            values = [objective.get(int(iteration)) for iteration in iterations]
            lines.append(Series(name="validation objective", values=values, tone="kl", has_line=False))
        known = [value for value in lines[0].finite if value is not None]
        label = f"{title} over the iterations"
        label += f", from {known[0]:.4g} to {known[-1]:.4g}" if known else ""
        chart = line_chart(
            label,
            iterations,
            lines,
            x_label="iteration",
            decimals=3,
            marks=_marks(name, outcome),
            include=[0.0, 1.0] if name == "response/eos_rate" else [],
        )
        panels.append(Panel(title=title, chart=chart, legend=[(line.name, line.tone) for line in lines]))
    return panels


def _marks(name: str, outcome: Outcome) -> Marks:
    """The exported iteration and the guard's events in every panel, and the limit of the KL in its own."""
    exported = [(outcome.iteration, EXPORTED)] if outcome.reason else []
    return Marks(
        x=[*exported, *((event.iteration, REFUSED) for event in outcome.events)],
        y=[(outcome.max_kl, f"at most {outcome.max_kl:g}")] if name == KL and outcome.max_kl is not None else [],
    )


def as_picture(history: Sequence[Row], outcome: Outcome | None = None) -> str:
    """All panels as one SVG."""
    return picture([(panel.title, panel.chart, panel.legend) for panel in panels_of(history, outcome)])


def as_html(history: Sequence[Row], ppo: PpoConfig, outcome: Outcome | None = None) -> str:
    scored = [row for row in history if SCORE in row]
    facts = (
        f"{len(history)} iterations of {ppo.rollout.num_prompts * ppo.rollout.samples_per_prompt} responses; "
        f"score {scored[0][SCORE]:.2f} to {scored[-1][SCORE]:.2f}, KL {scored[-1][KL]:.2f} nats per response, "
        f"KL coefficient {history[-1]['kl/coef']:.3g}."
    )
    notes = [f"{text[0].upper()}{text[1:]}." for text in _notes(outcome)]
    panels = panels_of(history, outcome)
    names = [(name, title) for name, title in PANELS if any(name in row for row in history)]
    rows = [
        [f"{row['iteration']:.0f}", *(f"{row[name]:.4g}" if name in row else "" for name, _ in names)]
        for row in history
    ]  # fmt: skip
    return render(
        Path(__file__).with_name("curves.html"),
        facts=facts,
        notes=notes,
        panels=panels,
        head=["iteration", *(title.partition(" (")[0] for _, title in names)],
        rows=rows,
        has_objective=any("validation objective" in dict(panel.legend) for panel in panels),
        shapes=SHAPES,
    )


def _notes(outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return []
    return [outcome.sentence, *(f"guard, {event}" for event in outcome.events)]
