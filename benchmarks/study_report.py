"""The tables, the samples and the plot of a study, written into the documents between their marks."""

import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import ROOT, rewrite
from components.rlhf.text.progress import format_duration

Row = dict[str, Any]
PLOT = ROOT / "benchmarks" / "movie_study.svg"
COLOURS = {"quick": "#2563eb", "full": "#16a34a", "small KL": "#dc2626"}
PANELS = (
    ("reward", "reward model's score\n(in spreads of SFT's)"),
    ("judge_score", "judge's score\n(rating; PPO never sees it)"),
    ("eos_rate", "share that ends by itself"),
)
KL_TICKS = (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
MIN_WIN_RATE, MAX_KL, MIN_DISTINCT, MAX_GIB = 0.6, 6.0, 0.85, 3.0  # what the quick preset is held to on every seed
GOAL_WIN_RATE, GOAL_KL, GOAL_MINUTES = 0.75, 4.0, 6.0


def write_report(rows: Sequence[Row]) -> None:
    """Rewrite the documents from one row a run. Rows must be of one study: the same settings for every seed of an arm."""
    plot(rows)
    rewrite(ROOT / "README.md", "study", f"{by_arm(rows)}\n\n{held_to(rows)}")
    rewrite(ROOT / "README.md", "samples", samples(next(row for row in rows if row["arm"] == "quick")))
    rewrite(ROOT / "components" / "ppo" / "README.md", "study", by_seed(rows))


def by_arm(rows: Sequence[Row]) -> str:
    """One line an arm: means over its seeds, and the lowest lower end of its intervals."""
    lines = [
        "| | seeds | judge prefers PPO | lowest interval | at equal length | KL | distinct-2 of SFT's | ends by itself, SFT to PPO "
        "| minutes | memory | gate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == arm]
        numbers = [numbers_of(row) for row in runs]
        worst = min(numbers, key=lambda n: n["win_rate_low"])
        lines.append(
            f"| {arm} | {len(runs)} | {spread([n['win_rate'] for n in numbers], '.3f')} "
            f"| [{worst['win_rate_low']:.3f}, {worst['win_rate_high']:.3f}] "
            f"| {spread([n['win_rate_cut'] for n in numbers], '.3f')} "
            f"| {spread([n['kl'] for n in numbers], '.2f')} "
            f"| {spread([n['distinct2_ppo'] / n['distinct2_sft'] for n in numbers], '.0%')} "
            f"| {mean(n['eos_rate_sft'] for n in numbers):.0%} to {mean(n['eos_rate_ppo'] for n in numbers):.0%} "
            f"| {spread_of_times([row['seconds'] for row in runs])} | {max(map(peak_gib, runs)):.1f} GiB "
            f"| promotes {sum(row['promoted'] for row in runs)} of {len(runs)} |"
        )
    accuracy = [numbers_of(row) for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"Judge and reward model agree with people on {spread([n['judge_accuracy'] for n in accuracy], '.1%')} and "
            f"{spread([n['reward_model_accuracy'] for n in accuracy], '.1%')} of held-out human pairs. "
            f"Means with the range over seeds; {rows[0]['machine']}.",
        ]
    )


def by_seed(rows: Sequence[Row]) -> str:
    """One line a run."""
    lines = [
        "| run | seed | judge prefers PPO | equal length and ending | both cut to equal length | KL | judge's gain | reward's gain "
        "| distinct-2, SFT and PPO | length, SFT and PPO | ends by itself, SFT and PPO | minutes | memory | gate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        n = numbers_of(row)
        lines.append(
            f"| {row['arm']} | {row['seed']} | {interval(n, 'win_rate')} "
            f"| {interval(n, 'win_rate_matched')} of {n['num_matched']:.0f} | {interval(n, 'win_rate_cut')} "
            f"| {n['kl']:.2f} | {n['judge_score_ppo'] - n['judge_score_sft']:+.2f} "
            f"| {n['reward_ppo'] - n['reward_sft']:+.2f} | {n['distinct2_sft']:.3f}, {n['distinct2_ppo']:.3f} "
            f"| {n['length_sft']:.1f}, {n['length_ppo']:.1f} | {n['eos_rate_sft']:.0%}, {n['eos_rate_ppo']:.0%} "
            f"| {format_duration(row['seconds'])} | {peak_gib(row):.1f} GiB | {'promoted' if row['promoted'] else 'rejected'} |"
        )
    return "\n".join([*lines, "", f"Of {numbers_of(rows[0])['num_prompts']:.0f} prompts each; {rows[0]['machine']}."])


def held_to(rows: Sequence[Row]) -> str:
    """What the presets are held to, and on how many seeds they keep it."""
    quick, full = ([row for row in rows if row["arm"] == arm] for arm in ("quick", "full"))
    kept = [met(row) for row in quick]
    goal = [numbers_of(r)["win_rate"] >= GOAL_WIN_RATE and numbers_of(r)["kl"] <= GOAL_KL for r in quick]
    fast = [row["seconds"] <= 60 * GOAL_MINUTES for row in quick]
    above = [numbers_of(row)["win_rate_low"] > MIN_WIN_RATE for row in full]
    return (
        f"Held to, on every seed of quick: the interval above {MIN_WIN_RATE:g} at a KL of at most {MAX_KL:g}, distinct-2 at least "
        f"{MIN_DISTINCT:.0%} of SFT's, at most {MAX_GIB:g} GiB: **kept on {sum(kept)} of {len(kept)}**. Of full, the interval above "
        f"{MIN_WIN_RATE:g}: **{sum(above)} of {len(above)}**. Goals beyond: {GOAL_WIN_RATE:g} at a KL of at most {GOAL_KL:g}, "
        f"reached on {sum(goal)} of {len(goal)}; {GOAL_MINUTES:g} minutes, on {sum(fast)} of {len(fast)}."
    )


def met(row: Row) -> bool:
    n = numbers_of(row)
    return bool(
        n["win_rate_low"] > MIN_WIN_RATE
        and n["kl"] <= MAX_KL
        and n["distinct2_ppo"] >= MIN_DISTINCT * n["distinct2_sft"]
        and peak_gib(row) <= MAX_GIB
    )


def samples(row: Row) -> str:
    lines = []
    for group, pairs in row["samples"].items():
        lines += [f"**{group}**", "", "| prompt | SFT goes on | PPO goes on | judge |", "|---|---|---|---:|"]
        lines += [
            f"| {cell(p['prompt'])} | {cell(p['sft'])} | {cell(p['ppo'])} | {p['gain']:+.2f} |" for p in pairs
        ] + [""]
    return "\n".join([*lines, f"Preset {row['arm']}, seed {row['seed']}."])


@matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"})  # the same rows give the same small file
def plot(rows: Sequence[Row]) -> None:
    """Both scores and the EOS rate against KL and against rollouts: a line a run."""
    figure, axes = plt.subplots(len(PANELS), 2, figsize=(11, 9), sharey="row", constrained_layout=True)
    furthest = max(look["kl"] for row in rows for look in row["training"])
    for line, (name, title) in zip(axes, PANELS, strict=True):
        for axis, across in zip(line, ("kl", "num_rollouts"), strict=True):
            seen: set[str] = set()
            for row in rows:
                arm = row["arm"]
                label = None if arm in seen else arm
                seen.add(arm)
                xs, ys = [max(r[across], 0) for r in row["training"]], [r[name] for r in row["training"]]
                axis.plot(xs, ys, "o-", color=COLOURS[arm], linewidth=1.4, markersize=3, alpha=0.8, label=label)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(title)
        # An estimate of a distance of policies grows like its square (Gao et al. 2022 plot against the root, too).
        line[0].set_xscale("function", functions=(np.sqrt, np.square))
        ticks = [tick for tick in KL_TICKS if tick <= 1.1 * furthest]
        line[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1][0].set_ylim(-0.03, 1.03)
    axes[0][0].legend(frameon=False)
    axes[-1][0].set_xlabel("KL to the fine-tuned model (nats per response; axis in roots)")
    axes[-1][1].set_xlabel("responses trained on")
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def numbers_of(row: Row) -> dict[str, float]:
    found: dict[str, float] = row["evaluation_all"]
    return found


def peak_gib(row: Row) -> float:
    return max(float(stage["peak_memory_bytes"]) for stage in row["stages"].values()) / 2**30


def interval(numbers: dict[str, float], name: str) -> str:
    return f"{numbers[name]:.3f} [{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]"


def mean(values: Any) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float], form: str) -> str:
    """Mean, with the range where there are several."""
    middle = format(mean(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def spread_of_times(seconds: Sequence[float]) -> str:
    middle = format_duration(mean(seconds))
    return (
        middle
        if len(seconds) == 1
        else f"{middle} ({format_duration(min(seconds))} to {format_duration(max(seconds))})"
    )


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
