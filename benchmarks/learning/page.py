"""The tables, goals and plot of the comparison in benchmarks/LEARNING.md."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning.arms import OURS_ARM, SFT, TRL, TRL_OWN
from benchmarks.learning.curves import Pair, Row, compare, curve_of, mean_and_spread
from benchmarks.record import ROOT, replace_section
from components.rlhf.config.params import Params

SYSTEMS = (OURS_ARM.name, TRL.name, TRL_OWN.name)
COLORS = dict(zip(SYSTEMS, ("#2563eb", "#dc2626", "#a3a3a3"), strict=True))
PANELS = (
    ("reward", "reward model score\n(standard deviations of SFT)"),
    ("judge", "judge score\n(rating; seen by neither)"),
)
KL_TICKS = (0, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 32)
HIGHER = "At equal KL our judge score is at least TRL's"
FASTER = "What TRL reaches at its last rollout is reached with half the rollouts"
MAX_SHARE = 0.5  # of TRL's rollouts
Measured = Mapping[int, Sequence[Row]]  # by seed


def write_page(measured: Measured, params: Params, root: Path = ROOT) -> None:
    """Rewrite the sections of LEARNING.md and the plot."""
    page = root / "benchmarks" / "LEARNING.md"
    replace_section(page, "learning", tables(measured, params))
    if any(measured.values()):
        plot(measured, root / "benchmarks" / "learning.svg")


def tables(measured: Measured, params: Params) -> str:
    """What is missing, the comparison of each seed, the goals, and all measured policies."""
    pairs = list(pairs_of(measured))
    parts = [missing_text(measured, params)]
    parts += [pair_table(pairs)] if pairs else []
    parts.append(goals_text(pairs, len(measured)))
    rows = [row for seed in measured for row in measured[seed]]
    if rows:
        parts += [policy_table(measured), where(rows)]
    return "\n\n".join(part for part in parts if part)


def pairs_of(measured: Measured) -> Iterator[Pair]:
    """Both systems of each seed, to the last iteration of which both are measured."""
    for seed, rows in measured.items():
        ours, peer = (curve_of(rows, name, SFT) for name in (OURS_ARM.name, TRL.name))
        last = min(curve[-1]["iteration"] if curve else 0 for curve in (ours, peer))
        if last:
            yield compare(seed, *([row for row in curve if row["iteration"] <= last] for curve in (ours, peer)))


def missing_text(measured: Measured, params: Params) -> str:
    """Which seeds are measured, and what is not measured yet."""
    whole = params.ppo.num_iterations * params.ppo.rollout.num_prompts
    missing = []
    for seed, rows in measured.items():
        for name in (OURS_ARM.name, TRL.name):
            curve = curve_of(rows, name, SFT)
            done = int(curve[-1]["num_rollouts"]) if curve else 0
            if done < whole:
                missing.append(f"{name} on seed {seed}{f' after {done} rollouts' if done else ''}")
    if not missing:
        return ""
    return f"**Not measured yet**: {', '.join(missing)}. Systems are compared up to the last rollout that both have."


def pair_table(pairs: Sequence[Pair]) -> str:
    lines = [
        "| seed | rollouts | KL that both reach | judge gain there, ours | TRL | at half of it, ours | TRL | reward gain there, ours | TRL "
        "| TRL's last judge gain | our rollouts to reach it |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for pair in pairs:
        reached = "not reached" if pair.rollouts is None else f"{pair.rollouts:.0f}"
        columns = [*pair.judge, *pair.judge_half, *pair.reward, pair.peer_last]
        lines.append(
            f"| {pair.seed} | {pair.peer_rollouts} | {pair.kl:.2f} | {' | '.join(f'{x:+.3f}' for x in columns)} | {reached} |"
        )
    rows = [(*p.judge, *p.judge_half, *p.reward, p.peer_last) for p in pairs]
    means = [mean_and_spread(column, "+.3f") for column in zip(*rows, strict=True)]
    counts = [pair.rollouts for pair in pairs if pair.rollouts is not None]
    rollouts = mean_and_spread(counts, ".0f") if len(counts) == len(pairs) else f"{len(counts)} of {len(pairs)} seeds"
    lines.append(
        f"| mean ± sd | | {mean_and_spread([p.kl for p in pairs], '.2f')} | {' | '.join(means)} | {rollouts} |"
    )
    return "\n".join(lines)


def goals_text(pairs: Sequence[Pair], num_seeds: int) -> str:
    """The goals, each met or missed on the mean of the measured seeds."""
    if not pairs:
        return "\n".join(["Goals:", "", f"- {HIGHER}: not measured.", f"- {FASTER}: not measured."])
    gains, shares = [pair.gain for pair in pairs], [pair.share for pair in pairs]
    of = f"{len(pairs)} of {num_seeds} seeds measured"
    higher, faster = sum(gain >= 0 for gain in gains), sum(share <= MAX_SHARE for share in shares)
    mean_share = statistics.fmean(shares)
    spread = "" if np.isinf(mean_share) else f" ({mean_and_spread(shares, '.2f')} of TRL's rollouts)"
    return "\n".join(
        [
            f"Goals, on the mean over the seeds ({of}):",
            "",
            f"- {HIGHER}: **{verdict(statistics.fmean(gains) >= 0)}** "
            f"(difference {mean_and_spread(gains, '+.3f')}; on {higher} of {len(pairs)} seeds).",
            f"- {FASTER}: **{verdict(mean_share <= MAX_SHARE)}**{spread}; on {faster} of {len(pairs)} seeds.",
        ]
    )


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def policy_table(measured: Measured) -> str:
    """One line per measured policy."""
    lines = [
        "| seed | system | rollouts | KL to SFT | reward | judge score | gain over SFT (standard error) | win rate v SFT | distinct-2 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for seed, rows in measured.items():
        sft = next((row for row in rows if row["system"] == SFT), None)
        order = sorted(rows, key=lambda row: ((SFT, *SYSTEMS).index(row["system"]), row["iteration"]))
        for row in order if sft is not None else []:
            assert sft is not None
            lines.append(
                f"| {seed} | {row['system']} | {row['num_rollouts']} | {row['kl']:.2f} | {row['reward']:+.2f} "
                f"| {row['judge']:+.3f} | {row['judge'] - sft['judge']:+.3f} ({row['judge_gain_error']:.3f}) "
                f"| {row['win_rate']:.3f} | {row['distinct2']:.3f} |"
            )
    return "\n".join(lines)


def where(rows: Sequence[Row]) -> str:
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    revisions = ", ".join(dict.fromkeys(row["revision"][:12] for row in rows))
    return f"{rows[0]['num_prompts']} held-out prompts per policy; revision {revisions}; {machines}. Not measured on a GPU."


@matplotlib.rc_context({"svg.hashsalt": "learning", "svg.fonttype": "none"})  # reproducible and small
def plot(measured: Measured, path: Path) -> None:
    """Reward and judge score against KL and against rollouts, one line per system and seed."""
    figure, axes = plt.subplots(len(PANELS), 2, figsize=(11, 7), sharey="row", constrained_layout=True)
    for panel, (name, title) in zip(axes, PANELS, strict=True):
        for axis, x_name in zip(panel, ("kl", "num_rollouts"), strict=True):
            draw(axis, measured, x_name, name)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        panel[0].set_ylabel(title)
        # KL grows like the square of the distance between policies (Gao et al. 2022).
        panel[0].set_xscale("function", functions=(np.sqrt, np.square))
        largest = max(row["kl"] for rows in measured.values() for row in rows)
        ticks = [tick for tick in KL_TICKS if tick <= 1.1 * largest]
        panel[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0][0].legend(frameon=False)
    axes[-1][0].set_xlabel("KL to SFT (nats per response; square-root scale)")
    axes[-1][1].set_xlabel("rollouts (responses trained on)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw(axis: Any, measured: Measured, x_name: str, name: str) -> None:
    labeled: set[str] = set()
    for rows in measured.values():
        for system in SYSTEMS:
            curve = curve_of(rows, system, SFT)
            if curve:
                label = None if system in labeled else system
                labeled.add(system)
                xs, ys = [max(row[x_name], 0) for row in curve], [row[name] for row in curve]
                axis.plot(xs, ys, "o-", color=COLORS[system], linewidth=1.4, markersize=3, alpha=0.8, label=label)
