"""Write the tables, samples and plot of a study into the documents."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import ROOT, replace_section
from benchmarks.report import result_table
from components.rlhf.text.progress import format_duration

Row = dict[str, Any]
COLORS = {"quick": "#2563eb", "full": "#16a34a", "small KL": "#dc2626"}
PANELS = (
    ("reward", "reward model score\n(standard deviations of SFT)"),
    ("judge_score", "judge score\n(rating; not seen by PPO)"),
    ("eos_rate", "EOS rate"),
)
KL_TICKS = (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
MIN_WIN_RATE, MAX_KL, MIN_DISTINCT, MAX_GIB = 0.6, 6.0, 0.85, 3.0  # bounds of the quick preset on every seed
GOAL_WIN_RATE, GOAL_KL, GOAL_MINUTES = 0.75, 4.0, 6.0
FRESH_WIN_RATE, FRESH_DISTINCT = 0.78, 0.9  # goal on seeds that chose no setting, with GOAL_KL
HEALTH = (
    ("reward", "reward model score, validation prompts\n(standard deviations of SFT)"),
    ("judge_score", "judge score, validation prompts\n(rating; not seen by PPO)"),
    ("kl/sequence", "KL to SFT\n(nats per response)"),
    ("entropy", "entropy\n(nats per token)"),
    ("value/explained_variance", "explained variance of the critic"),
    ("actor/grad_norm", "gradient norm of the actor"),
)


def write_report(rows: Sequence[Row], root: Path = ROOT) -> None:
    """Rewrite the documents from one row per run. All seeds of an arm must have the same settings."""
    plot(rows, root / "benchmarks" / "movie_study.svg")
    plot_health(rows, root / "benchmarks" / "movie_health.svg")
    results = root / "docs" / "results.md"
    replace_section(results, "study", f"{arm_table(rows)}\n\n{bounds_text(rows)}")
    replace_section(results, "samples", sample_tables(next(row for row in rows if row["arm"] == "quick")))
    replace_section(root / "components" / "ppo" / "README.md", "study", run_table(rows))
    headline = result_table(next(row for row in rows if row["arm"] == "full"), headline=True)
    replace_section(root / "README.md", "result", headline)


def write_fresh_seeds(rows: Sequence[Row], root: Path = ROOT) -> None:
    """Rewrite the table of the runs whose seeds chose no setting."""
    replace_section(root / "docs" / "results.md", "fresh seeds", f"{run_table(rows)}\n\n{goal_text(rows)}")


def goal_text(rows: Sequence[Row]) -> str:
    """How many runs reach the goal for the quick preset on fresh seeds."""
    met = [
        n["win_rate"] >= FRESH_WIN_RATE
        and n["kl"] <= GOAL_KL
        and n["distinct2_ppo"] >= FRESH_DISTINCT * n["distinct2_sft"]
        for n in map(metrics_of, rows)
    ]
    return (
        f"Goal: win rate of at least {FRESH_WIN_RATE:g} at a KL of at most {GOAL_KL:g}, with distinct-2 at least {FRESH_DISTINCT:.0%} "
        f"of SFT: **met on {sum(met)} of {len(met)}**."
    )


def arm_table(rows: Sequence[Row]) -> str:
    """One line per arm: means over its seeds, and the interval with the lowest lower end."""
    lines = [
        "| | seeds | win rate (judge) | lowest interval | win rate, both cut to equal length | KL to SFT | distinct-2, PPO / SFT "
        "| EOS rate, SFT to PPO | minutes | memory | gate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == arm]
        numbers = [metrics_of(row) for row in runs]
        worst = min(numbers, key=lambda n: n["win_rate_low"])
        lines.append(
            f"| {arm} | {len(runs)} | {mean_and_range([n['win_rate'] for n in numbers], '.3f')} "
            f"| [{worst['win_rate_low']:.3f}, {worst['win_rate_high']:.3f}] "
            f"| {mean_and_range([n['win_rate_cut'] for n in numbers], '.3f')} "
            f"| {mean_and_range([n['kl'] for n in numbers], '.2f')} "
            f"| {mean_and_range([n['distinct2_ppo'] / n['distinct2_sft'] for n in numbers], '.0%')} "
            f"| {mean(n['eos_rate_sft'] for n in numbers):.0%} to {mean(n['eos_rate_ppo'] for n in numbers):.0%} "
            f"| {mean_duration([row['seconds'] for row in runs])} | {max(map(peak_gib, runs)):.1f} GiB "
            f"| promotes {sum(row['promoted'] for row in runs)} of {len(runs)} |"
        )
    accuracy = [metrics_of(row) for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"Accuracy on held-out human pairs: judge {mean_and_range([n['judge_accuracy'] for n in accuracy], '.1%')}, "
            f"reward model {mean_and_range([n['reward_model_accuracy'] for n in accuracy], '.1%')}. "
            f"Means with the range over seeds; {rows[0]['machine']}.",
        ]
    )


def run_table(rows: Sequence[Row]) -> str:
    """One line per run."""
    lines = [
        "| run | seed | win rate (judge) | at equal length and ending | both cut to equal length | KL to SFT | judge score gain "
        "| reward gain | distinct-2, SFT and PPO | length, SFT and PPO | EOS rate, SFT and PPO | minutes | memory | gate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        n = metrics_of(row)
        lines.append(
            f"| {row['arm']} | {row['seed']} | {interval(n, 'win_rate')} "
            f"| {interval(n, 'win_rate_matched')} of {n['num_matched']:.0f} | {interval(n, 'win_rate_cut')} "
            f"| {n['kl']:.2f} | {n['judge_score_ppo'] - n['judge_score_sft']:+.2f} "
            f"| {n['reward_ppo'] - n['reward_sft']:+.2f} | {n['distinct2_sft']:.3f}, {n['distinct2_ppo']:.3f} "
            f"| {n['length_sft']:.1f}, {n['length_ppo']:.1f} | {n['eos_rate_sft']:.0%}, {n['eos_rate_ppo']:.0%} "
            f"| {format_duration(row['seconds'])} | {peak_gib(row):.1f} GiB | {'promoted' if row['promoted'] else 'rejected'} |"
        )
    num_prompts = metrics_of(rows[0])["num_prompts"]
    return "\n".join([*lines, "", f"{num_prompts:.0f} held-out prompts per run; {rows[0]['machine']}."])


def bounds_text(rows: Sequence[Row]) -> str:
    """The bounds that the presets must meet, and the number of seeds on which they meet them."""
    quick, full = ([row for row in rows if row["arm"] == arm] for arm in ("quick", "full"))
    met = [meets_bounds(row) for row in quick]
    goal = [metrics_of(r)["win_rate"] >= GOAL_WIN_RATE and metrics_of(r)["kl"] <= GOAL_KL for r in quick]
    fast = [row["seconds"] <= 60 * GOAL_MINUTES for row in quick]
    above = [metrics_of(row)["win_rate_low"] > MIN_WIN_RATE for row in full]
    return (
        f"Bounds on every seed of quick: interval of the win rate above {MIN_WIN_RATE:g}, KL at most {MAX_KL:g}, distinct-2 at least "
        f"{MIN_DISTINCT:.0%} of SFT, memory at most {MAX_GIB:g} GiB: **met on {sum(met)} of {len(met)}**. Bound on every seed of full: "
        f"interval above {MIN_WIN_RATE:g}: **met on {sum(above)} of {len(above)}**. Further goals for quick: win rate of at least "
        f"{GOAL_WIN_RATE:g} at a KL of at most {GOAL_KL:g}, met on {sum(goal)} of {len(goal)}; at most {GOAL_MINUTES:g} minutes, "
        f"met on {sum(fast)} of {len(fast)}."
    )


def meets_bounds(row: Row) -> bool:
    n = metrics_of(row)
    return bool(
        n["win_rate_low"] > MIN_WIN_RATE
        and n["kl"] <= MAX_KL
        and n["distinct2_ppo"] >= MIN_DISTINCT * n["distinct2_sft"]
        and peak_gib(row) <= MAX_GIB
    )


def sample_tables(row: Row) -> str:
    lines = []
    for group, pairs in row["samples"].items():
        lines += [
            f"**{group}**",
            "",
            "| prompt | SFT response | PPO response | judge score gain |",
            "|---|---|---|---:|",
        ]
        lines += [
            f"| {cell(p['prompt'])} | {cell(p['sft'])} | {cell(p['ppo'])} | {p['gain']:+.2f} |" for p in pairs
        ] + [""]
    return "\n".join([*lines, f"Preset {row['arm']}, seed {row['seed']}."])


@matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"})  # reproducible and small
def plot(rows: Sequence[Row], path: Path) -> None:
    """Both scores and the EOS rate against KL and against the number of rollouts, one line per run."""
    figure, axes = plt.subplots(len(PANELS), 2, figsize=(11, 9), sharey="row", constrained_layout=True)
    max_kl = max(point["kl"] for row in rows for point in row["training"])
    for panel, (name, title) in zip(axes, PANELS, strict=True):
        for axis, x_name in zip(panel, ("kl", "num_rollouts"), strict=True):
            labeled: set[str] = set()
            for row in rows:
                arm = row["arm"]
                label = None if arm in labeled else arm
                labeled.add(arm)
                xs, ys = [max(r[x_name], 0) for r in row["training"]], [r[name] for r in row["training"]]
                axis.plot(xs, ys, "o-", color=COLORS[arm], linewidth=1.4, markersize=3, alpha=0.8, label=label)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        panel[0].set_ylabel(title)
        # KL grows like the square of the distance between policies; Gao et al. 2022 also plot against its square root.
        panel[0].set_xscale("function", functions=(np.sqrt, np.square))
        ticks = [tick for tick in KL_TICKS if tick <= 1.1 * max_kl]
        panel[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1][0].set_ylim(-0.03, 1.03)
    axes[0][0].legend(frameon=False)
    axes[-1][0].set_xlabel("KL to SFT (nats per response; square-root scale)")
    axes[-1][1].set_xlabel("rollouts (responses trained on)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


@matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"})
def plot_health(rows: Sequence[Row], path: Path) -> None:
    """A healthy run of the quick preset and the one with a KL coefficient that is far too small, metric by metric over iterations."""
    healthy = next(row for row in rows if row["arm"] == "quick")
    sick = next(row for row in rows if row["arm"] == "small KL")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, HEALTH, strict=True):
        for row, style in ((healthy, "-"), (sick, "--")):
            points = row["training"] if name in row["training"][0] else row["history"]
            xs, ys = [point["iteration"] for point in points], [point[name] for point in points]
            axis.plot(
                xs, ys, style, color=COLORS[row["arm"]], linewidth=1.6, marker="o", markersize=3, label=row["arm"]
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("iteration", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    labels = [f"{kind}: {row['arm']}, seed {row['seed']}" for kind, row in (("healthy", healthy), ("sick", sick))]
    figure.legend(axes.flat[0].get_lines(), labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def metrics_of(row: Row) -> dict[str, float]:
    metrics: dict[str, float] = row["evaluation_all"]
    return metrics


def peak_gib(row: Row) -> float:
    return max(float(stage["peak_memory_bytes"]) for stage in row["stages"].values()) / 2**30


def interval(numbers: dict[str, float], name: str) -> str:
    return f"{numbers[name]:.3f} [{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]"


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def mean_and_range(values: Sequence[float], form: str) -> str:
    """The mean, with the range if there are several values."""
    middle = format(mean(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def mean_duration(seconds: Sequence[float]) -> str:
    """The mean as M:SS, with the range if there are several values."""
    middle = format_duration(mean(seconds))
    if len(seconds) == 1:
        return middle
    return f"{middle} ({format_duration(min(seconds))} to {format_duration(max(seconds))})"


def cell(text: str) -> str:
    """Text of a model as the content of one table cell."""
    return " ".join(text.split()).replace("|", "\\|")
