"""The charts of the report, and the texts that say what they show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from components.evaluation.compare import Comparison
from components.evaluation.judge_curve import over_optimization
from components.evaluation.judging import Judged
from components.evaluation.samples import MAX_POINTS
from components.rlhf.artifacts.manifest import Fact
from components.rlhf.config.policy import TITLES
from components.rlhf.page.charts import Marks, Series, histogram, line_chart, scatter

# Metric of a validation pass, title, color, decimals.
PANELS = (
    ("reward", "reward, which PPO raises", "reward", 3),
    ("judge_score", "score of the first judge", "judge", 3),
    ("kl", "KL to SFT, nats per response", "kl", 2),
    ("length", "length, tokens", "policy", 1),
    ("eos_rate", "EOS rate", "policy", 3),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its title; legend has the name and color of each line, in their order."""

    title: str
    chart: Markup
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()
    has_bars: bool = False


def reward_against_kl(training: Sequence[Mapping[str, float]], kept: Fact | None) -> Figure | None:
    """Gains of reward and judge over the KL, with the region of over-optimization; None without both gains in every pass."""
    rows = [row for row in training if "reward_gain" in row and "judge_gain" in row]
    if len(rows) < 2 or len(rows) < len(training):
        return None
    found = over_optimization(rows)
    region = None
    if found and found.kl[1] > found.kl[0]:
        region = (*found.kl, "over-optimized" if found.is_clear else "over-optimized? within noise")
    xs = [row["kl"] for row in rows]
    exported = [(row["kl"], "exported") for row in rows if kept is not None and row["iteration"] == float(kept)]
    lines = [
        Series(name="reward", values=[row["reward_gain"] for row in rows], tone="reward"),
        Series(name="judge", values=[row["judge_gain"] for row in rows], tone="judge"),
    ]
    label = (
        f"Gains over the fine-tuned model against the KL. At a KL of {xs[-1]:.2f} in the last validation pass the reward has gained "
        f"{lines[0].values[-1]:.2f} and the judge's score {lines[1].values[-1]:.2f} standard deviations. "
    )
    label += f"Marked as over-optimized: KL {region[0]:.2f} to {region[1]:.2f}." if region else "No region is marked."
    # One label above the plot: the name of the region, or that of the exported policy.
    marks = Marks(x=[(x, "" if region else text) for x, text in exported], region=region)
    chart = line_chart(
        label, xs, lines, x_label="KL to SFT, nats per response", x_decimals=2, marks=marks, include=[0.0]
    )
    return Figure(
        title="Reward and judge against KL",
        chart=chart,
        note="gain in standard deviations of the fine-tuned model's scores",
        legend=[(line.name, line.tone) for line in lines],
    )


def training_figures(training: Sequence[Mapping[str, float]], kept: Fact | None, max_kl: float | None) -> list[Figure]:
    """A chart over the iterations for each metric in PANELS that was measured; a dashed line is at the exported iteration."""
    figures = []
    for name, title, tone, decimals in PANELS:
        if not training or name not in training[0]:
            continue
        xs, values = [row["iteration"] for row in training], [row[name] for row in training]
        limit = [(max_kl, f"limit of the gate {max_kl:g}")] if name == "kl" and max_kl is not None else []
        marks = Marks(x=[] if kept is None else [(float(kept), "exported")], y=limit)
        label = f"{title} over the iterations, from {values[0]:.{decimals}f} to {values[-1]:.{decimals}f}"
        chart = line_chart(
            label,
            xs,
            [Series(name=name.replace("_", " "), values=values, tone=tone)],
            x_label="iteration",
            decimals=decimals,
            marks=marks,
            include=[0.0, 1.0] if name == "eos_rate" else [],
        )
        figures.append(Figure(title=title, chart=chart))
    return figures


def training_table(training: Sequence[Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the values of all validation passes."""
    panels = [panel for panel in PANELS if training and panel[0] in training[0]]
    head = ["iteration", "responses trained on", *(title.partition(",")[0] for _, title, _, _ in panels)]
    rows = [
        [f"{row['iteration']:.0f}", f"{row['num_rollouts']:,.0f}", *(f"{row[name]:.{d}f}" for name, _, _, d in panels)]
        for row in training
    ]
    return head, rows


def score_figures(comparison: Comparison, judge: Judged) -> list[Figure]:
    """Distributions of the judge's scores, and its gains against those of the reward model, if there is one; [] without scores."""
    if judge.sft_scores is None or judge.policy_scores is None or judge.cannot_tell:
        return []
    figures = [_distribution("judge score", judge.sft_scores, judge.policy_scores, comparison)]
    sft, policy = comparison.sft.rewards, comparison.policy.rewards
    if sft is None or policy is None:
        return figures
    figures.append(_distribution("reward model score", sft, policy, comparison))
    scores = zip(sft, policy, judge.sft_scores, judge.policy_scores, strict=True)
    points = [(p - s, b - a) for s, p, a, b in scores]
    both = sum(x > 0 and y > 0 for x, y in points)
    only = sum(x > 0 and y < 0 for x, y in points)
    label = (
        f"Gain of the judge's score, upward, against gain of the reward model's, for {len(points):,} responses: both rise in {both:,}; "
        f"the reward model's rises and the judge's falls in {only:,}."
    )
    step = -(-len(points) // MAX_POINTS)
    chart = scatter(
        label,
        points[::step],
        x_label="gain of the reward model's score",
        tone="policy",
        quadrant=f"only the reward rises: {only / len(points):.1%}",
    )
    shown = "a point per response" if step == 1 else f"a point for every {step}th response"
    return [*figures, Figure(title="Gain of the judge's score", chart=chart, note=shown)]


def length_figure(comparison: Comparison) -> Figure | None:
    """None if all responses have the same length."""
    lengths = [[c.num_model_tokens for c in r.completions] for r in (comparison.sft, comparison.policy)]
    if len({length for own in lengths for length in own}) < 2:
        return None
    return _distribution("length, tokens", *lengths, comparison, whole=True)


def _distribution(
    name: str, sft: Sequence[float], policy: Sequence[float], comparison: Comparison, *, whole: bool = False
) -> Figure:
    groups = [
        Series(name="SFT", values=sft, tone="sft"),
        Series(name=TITLES[comparison.method], values=policy, tone="policy"),
    ]
    means = [f"{group.name} has a mean of {fmean(group.values):.2f}" for group in groups]  # type: ignore[type-var]
    label = f"Distribution of {name} over {len(sft):,} responses each: {' and '.join(means)}."
    chart = histogram(label, groups, x_label=name, whole=whole)
    return Figure(
        title=name.capitalize(),
        chart=chart,
        note="number of responses",
        legend=[(g.name, g.tone) for g in groups],
        has_bars=True,
    )


def win_rate_rows(numbers: Mapping[str, float], judges: Sequence[Judged]) -> list[dict[str, Any]]:
    """All win rates with their intervals, for a picture: name, value, low and high."""
    names = {
        "win_rate": f"judge {judges[0].name}, which decides",
        "win_rate_length_controlled": "length-controlled",
        "win_rate_matched": f"equal length and ending ({numbers.get('num_matched', 0):.0f} responses)",
        "win_rate_cut": "both cut to equal length",
        **{f"judges/{judge.name}/win_rate": f"judge {judge.name}" for judge in judges[1:]},
    }
    rows = [
        {"name": text, "value": numbers[name], "low": numbers[f"{name}_low"], "high": numbers[f"{name}_high"]}
        for name, text in names.items()
        if f"{name}_low" in numbers
    ]
    if rows and "reward_win_rate" in numbers:
        rows.append({"name": "reward model", "value": numbers["reward_win_rate"], "low": None, "high": None})
    return rows
