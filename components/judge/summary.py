"""The judges as Markdown."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from components.rlhf.config.scoring import VERIFIABLE

if TYPE_CHECKING:
    from components.judge.panel import MeasuredJudge
    from components.rlhf.rewards.linear import LinearJudge  # imports scikit-learn

NUM_TERMS = 12


def as_markdown(judges: Sequence["MeasuredJudge"]) -> str:
    """A table with a row for each judge, and what there is to say about each."""
    lines = [
        "# Judges",
        "",
        "Agreement with people on held-out pairs, with 95% interval; ties are halves. The first judge decides at the gate.",
        "",
        "| judge | agreement | pairs | longer text preferred | same in both orders | no answer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for judge in judges:
        name, agreement = judge.entry.settings.title, judge.entry.agreement
        unanswered = f"{judge.numbers['num_unanswered']:.0f}"
        if isinstance(judge.entry.settings, VERIFIABLE):
            lines.append(f"| {name} | verifies answers | | | | |")
            continue
        if agreement is None:
            lines.append(f"| {name} | none | 0 | | | {unanswered} |")
            continue
        lines.append(
            f"| {name} | **{agreement.accuracy:.1%}** [{agreement.low:.1%}, {agreement.high:.1%}] | {agreement.num_pairs} "
            f"| {agreement.longer_wins:.1%} | {agreement.consistency:.1%} | {unanswered} |"
        )
    lines += ["", "`longer text preferred` is the agreement of a judge that always prefers the longer text.", ""]
    for judge in judges:
        name, reason = judge.entry.settings.title, judge.entry.cannot_tell
        if reason:
            lines += [f"**{name} cannot tell**: {reason}. The gate gives no verdict by it.", ""]
        if judge.notes:
            lines += [f"## {name}", "", judge.notes, ""]
    return "\n".join(lines)


def describe_linear(judge: "LinearJudge", quality: Mapping[str, float], *, of_ratings: bool) -> str:
    """The features of a linear judge, and its largest coefficients."""
    terms, order = judge.terms, np.argsort(judge.coefficients)
    worst, best = (
        ", ".join(f"`{_printable(terms[i])}`" for i in indices)
        for indices in (order[:NUM_TERMS], order[::-1][:NUM_TERMS])
    )
    text = f"A linear model on {len(terms):,} n-grams of {' and '.join(judge.vectorizers)}"
    if quality:
        measure = "rank correlation with the ratings" if of_ratings else "accuracy on the pairs"
        text += f", chosen by the {measure} of a fifth of its training data: " + ", ".join(
            f"{features} {value:.3f}" for features, value in quality.items()
        )
    return f"{text}.\n\nMost positive: {best}.\n\nMost negative: {worst}."


def _printable(term: str) -> str:
    """A term in one line of a Markdown table, with visible spaces."""
    text = term.replace(" ", "␣").replace("`", "'")
    return text if text.isprintable() else ascii(text)[1:-1]
