"""The report of the comparison: an HTML page with table, plots and samples, and the table as Markdown."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from components.evaluation.compare import Comparison
from components.evaluation.judging import Judged
from components.evaluation.samples import (
    NUM_EXTREMES,
    NUM_RANDOM,
    choose_disagreements,
    choose_rows,
    gains_of,
    turns_of,
)
from components.evaluation.side_by_side import SideBySide
from components.evaluation.verdict import Decision
from components.rlhf.artifacts.manifest import Fact
from components.rlhf.config.policy import TITLES
from components.rlhf.text.comparison_table import comparison_rows, method_of

Facts = Mapping[str, Fact]
NO_FACTS: Facts = MappingProxyType({})
TRAINING_PANELS = (
    ("reward", "reward (what PPO raises)"),
    ("judge_score", "score of the first judge"),
    ("kl", "KL (nats per response)"),
    ("eos_rate", "EOS rate"),
)


def as_markdown(
    numbers: Mapping[str, float],
    judges: Sequence[Judged],
    verdict: Decision,
    policy: Facts = NO_FACTS,
    both: SideBySide | None = None,
) -> str:
    """policy are the facts of its manifest; both has it beside the other policy of the run."""
    lines = [f"# {verdict.decision.capitalize()}", "", f"{verdict.reason}.", ""]
    lines += [line for sentence in policy_sentences(policy) for line in (sentence, "")] + [
        f"| | SFT | {TITLES[method_of(numbers)]} |",
        "|---|---:|---:|",
    ]
    lines += [f"| {row['name']} | {row['sft']} | {row['policy']} |" for row in comparison_rows(numbers)]
    lines += ["", "| judge | agreement with people | win rate |", "|---|---|---|"]
    for row in judge_rows(numbers, judges):
        cells = [row[name].replace("|", "\\|") for name in ("name", "agreement", "win_rate")]
        lines.append(f"| {' | '.join(cells)} |")
    if both:
        lines += ["", f"## {' and '.join(both.head[1:])} side by side", "", both.reason, ""]
        lines += [f"| | {' | '.join(both.head)} |", "|---" + "|---:" * len(both.head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in both.rows]
    return "\n".join(lines) + "\n"


def as_html(
    comparison: Comparison,
    judges: Sequence[Judged],
    numbers: Mapping[str, float],
    verdict: Decision,
    training: Sequence[Mapping[str, float]],
    *,
    seed: int,
    memory: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    policy: Facts = NO_FACTS,
    both: SideBySide | None = None,
) -> str:
    """A self-contained HTML page. training has one row per validation pass, and may be empty; memory has measurements by stage.

    policy are the facts of its manifest; both has it beside the other policy of the run.
    """
    template = jinja2.Environment(autoescape=True).from_string(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    )
    gives_scores = judges[0].policy_scores is not None and not judges[0].cannot_tell
    title = TITLES[comparison.method]
    return template.render(
        method=title,
        both=both,
        numbers=numbers,
        verdict=verdict,
        rows=comparison_rows(numbers),
        judges=judge_rows(numbers, judges),
        kappas=[(*key.split("/")[1:], value) for key, value in numbers.items() if key.startswith("kappa/")],
        plot=_plot(comparison, judges[0]) if gives_scores else "",
        policy=policy_sentences(policy),
        num_failed=comparison.num_failed,
        training_plot=_training_plot(training, policy.get("kept_iteration")) if training else "",
        groups=choose_samples(comparison, judges[0], seed=seed),
        gain="judge score gain" if gives_scores else f"{title} preferred (1) or not (-1)",
        disagreements=choose_disagreement_samples(comparison, judges, seed=seed),
        names=[judge.name for judge in judges],
        samples_each=NUM_EXTREMES,
        num_random=NUM_RANDOM,
        memory=memory_rows(memory),
    )


def policy_sentences(facts: Facts) -> list[str]:
    """Which iteration of PPO the policy was exported after and why, and what the guard did, from the facts of its manifest."""
    texts = [str(facts[name]) for name in ("kept_reason", "guard") if name in facts]
    return [f"{text[0].upper()}{text[1:]}." for text in texts if text]


def memory_rows(measurements: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """A row for each artifact whose stage compared its memory with its plan: what was planned and measured, in GiB."""
    rows = []
    for name, numbers in measurements.items():
        planned, peak = numbers.get("memory/planned_gib"), numbers.get("memory/peak_gib")
        if planned and peak:
            ratio = f"{planned / peak:.2f}"
            rows.append({"name": name, "planned": f"{planned:.2f}", "peak": f"{peak:.2f}", "ratio": ratio})
    return rows


def judge_rows(numbers: Mapping[str, float], judges: Sequence[Judged]) -> list[dict[str, str]]:
    """A row for each judge: its agreement with people, a baseline, its consistency, and its win rate or why it has none."""
    rows = []
    for number, judge in enumerate(judges):
        prefix = f"judges/{judge.name}/" if number else ""
        own = {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}
        agreement = judge.entry.agreement
        row = {
            "name": judge.name,
            "kind": judge.entry.settings.kind,
            "agreement": agreement.explain() if agreement else "needs none" if judge.verifies else "not measured",
            "longer": f"{agreement.longer_wins:.1%}" if agreement else "",
            "consistency": f"{own['judge_consistency']:.1%}" if "judge_consistency" in own else "",
            "cost": _cost_text(judge.counts),
            "win_rate": f"cannot tell: {judge.cannot_tell}",
        }
        if "win_rate" in own:
            row["win_rate"] = f"{own['win_rate']:.3f} [{own['win_rate_low']:.3f}, {own['win_rate_high']:.3f}]"
        rows.append(row)
    return rows


def _cost_text(counts: Mapping[str, float]) -> str:
    """What the answers of an endpoint took; empty for other judges."""
    if not counts:
        return ""
    text = f"{counts['requests']:,.0f} requests, {counts['cached']:,.0f} from the cache, "
    text += f"{counts['input_tokens'] + counts['output_tokens']:,.0f} tokens"
    text += f", cost {counts['cost']:.2f}" if counts["cost"] else ""
    without = ", ".join(f"{counts[name]:.0f} {name}" for name in ("refused", "unreadable", "rejected") if counts[name])
    return f"{text}; {without}" if without else text


def choose_samples(comparison: Comparison, judge: Judged, *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Selected pairs of responses, with the gain in judge score: only random ones, without gains, if the judge cannot tell."""
    gains = gains_of(judge)
    groups = choose_rows(gains, seed=seed)
    if judge.cannot_tell:
        return {"At random": [_sample(comparison, i) for i in groups["At random"] or range(len(gains))]}
    return {group: [_sample(comparison, i) | {"gain": gains[i]} for i in rows] for group, rows in groups.items()}


def choose_disagreement_samples(comparison: Comparison, judges: Sequence[Judged], *, seed: int) -> list[dict[str, Any]]:
    """Pairs of responses on which judges disagree, with the verdict of each judge."""
    title = TITLES[comparison.method]
    words = {1.0: title, 0.0: "SFT", 0.5: "tie"}
    return [
        _sample(comparison, i)
        | {
            "verdicts": [
                words.get(float(j.wins[i]), title if j.wins[i] > 0.5 else "SFT" if j.wins[i] < 0.5 else "")
                for j in judges
            ]
        }
        for i in choose_disagreements(judges, seed=seed)
    ]


def _sample(comparison: Comparison, row: int) -> dict[str, Any]:
    sft, policy = comparison.sft.completions[row], comparison.policy.completions[row]
    return {
        "prompt": comparison.prompts[row].prompt,
        "sft": sft.response,
        "policy": policy.response,
        **({"sft_turns": turns_of(sft), "policy_turns": turns_of(policy)} if sft.turns or policy.turns else {}),
    }


def _plot(comparison: Comparison, judge: Judged) -> str:
    """Histogram of the judge scores of both models, and scatter plot of judge score vs. reward model score per row, if there is one."""
    with_rewards = comparison.sft.rewards is not None
    figure, axes = plt.subplots(1, 1 + with_rewards, figsize=(11, 3.8), constrained_layout=True, squeeze=False)
    left, right = axes[0][0], axes[0][-1]
    for responses, scores, color, label in (
        (comparison.sft, judge.sft_scores, "#9ca3af", "SFT"),
        (comparison.policy, judge.policy_scores, "#2563eb", TITLES[comparison.method]),
    ):
        left.hist(scores, bins=30, alpha=0.65, color=color, label=label)
        if with_rewards:
            right.scatter(responses.rewards, scores, s=7, alpha=0.5, color=color, label=label)
    left.set_xlabel("judge score")
    left.set_ylabel("responses")
    if with_rewards:
        right.set_xlabel("reward model score")
        right.set_ylabel("judge score")
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return _as_svg(figure)


def _training_plot(training: Sequence[Mapping[str, float]], kept_iteration: Fact | None) -> str:
    """One plot of each metric in TRAINING_PANELS that was measured, over the iterations; a dashed line is at the exported one."""
    panels = [(name, title) for name, title in TRAINING_PANELS if name in training[0]]
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 2.9), constrained_layout=True)
    for axis, (name, title) in zip(axes, panels, strict=True):
        axis.plot([r["iteration"] for r in training], [r[name] for r in training], "o-", color="#2563eb", markersize=4)
        if kept_iteration is not None:
            axis.axvline(float(kept_iteration), color="#15803d", linestyle="--", linewidth=1.2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("iteration", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_ylim(-0.03, 1.03)
    return _as_svg(figure)


def _as_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
