"""Change one setting of a finished run and measure the effect: `python -m benchmarks.effects RUN [NAME ...]`.

RUN is a run directory (`make run ARGS="--out runs/base"`). Each change of CHANGES for the preset of the run reruns the first stage
whose settings it alters and all later ones, with the stage programs that containers start, and reuses the artifacts of the run for
the stages before. One row per change is appended to benchmarks/movie_effects.jsonl; changes that have a row are not run again.
"""

import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.record import ROOT, append_row, describe_machine, read_rows, replace_section, settings_digest
from benchmarks.stages import rerun, stages_to_run
from components.rlhf.artifacts.revision import code_revision
from pipelines.settings import load_params

ROWS = ROOT / "benchmarks" / "movie_effects.jsonl"
LOG = ROOT / "benchmarks" / "LOG.md"
BASELINE = "baseline"
CHANGES: dict[str, dict[str, list[str]]] = {
    "quick": {
        "no warm-up": ["ppo.training.warmup_fraction=0"],
        "half the actor's learning rate": ["ppo.training.learning_rate=5e-5"],
        "twice the actor's learning rate": ["ppo.training.learning_rate=2e-4"],
        "KL coefficient 0.10": ["ppo.kl_coef=0.10"],
        "KL coefficient 0.25": ["ppo.kl_coef=0.25"],
        "KL coefficient 0.001": ["ppo.kl_coef=0.001", "ppo.num_iterations=45"],
        "KL coefficient 0.001, reward model of 10 steps": [
            "reward_model.max_steps=10",
            "ppo.kl_coef=0.001",
            "ppo.num_iterations=30",
        ],
        "adaptive KL, target 4": ["ppo.kl_target=4", "ppo.kl_horizon=500"],
        "critic trains its layers": ["ppo.critic.trains=layers", "ppo.critic.learning_rate=1e-4"],
        "half the rollout batch": ["ppo.rollout.num_prompts=32", "ppo.minibatch=16"],
        "temperature 1": ["ppo.rollout.sampling.temperature=1.0", "ppo.kl_coef=0.05"],
        "one epoch per rollout": ["ppo.num_epochs=1"],
        "twice the reward model's steps": ["reward_model.max_steps=180"],
        "longer responses (24 tokens)": [
            "ppo.rollout.sampling.min_new_tokens=24",
            "ppo.rollout.sampling.max_new_tokens=24",
            "data.max_tokens=36",
        ],
    },
    "full": {
        "missing-EOS penalty 1": ["ppo.missing_eos_penalty=1"],
        "reward model on whole texts only": ["reward_model.prefix_loss=0"],
        "adaptive KL, target 4": ["ppo.kl_target=4", "ppo.kl_horizon=500"],
    },
}


def as_table(rows: list[dict[str, Any]]) -> str:
    """One line per change, with the unchanged run first."""
    lines = [
        "| change | settings | win rate (judge) | win rate, both cut to equal length | KL to SFT | reward gain | distinct-2, PPO / SFT "
        "| EOS rate, SFT to PPO | clip fraction of iteration 1 | seconds of PPO |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["change"] != BASELINE):
        n, history = row["evaluation"], row["history"]
        seconds = sum(
            value for iteration in history for name, value in iteration.items() if name.startswith("seconds/")
        )
        lines.append(
            f"| {row['change']} | {', '.join(f'`{setting}`' for setting in row['settings'])} "
            f"| {n['win_rate']:.3f} [{n['win_rate_low']:.3f}, {n['win_rate_high']:.3f}] | {n['win_rate_cut']:.3f} | {n['kl']:.2f} "
            f"| {n['reward_ppo'] - n['reward_sft']:+.2f} | {n['distinct2_ppo'] / n['distinct2_sft']:.0%} "
            f"| {n['eos_rate_sft']:.0%} to {n['eos_rate_ppo']:.0%} | {history[0]['actor/clip_fraction']:.1%} | {seconds:.0f} |"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/effects"), help="Folder for the outputs of the stages."
)
def main(run: Path, names: tuple[str, ...], out: Path) -> None:
    if not (run / "summary.json").is_file():
        sys.exit(f"{run} has no summary.json; expected the directory of a finished run")
    before = load_params(run / "params.yaml")
    changes = CHANGES.get(before.preset, {})
    unknown = [name for name in names if name not in (BASELINE, *changes)]
    if unknown:
        sys.exit(f"unknown change {unknown[0]!r}; preset {before.preset} has: {'; '.join(changes) or 'none'}")
    same_run = {"preset": before.preset, "seed": before.seed, "base_digest": settings_digest(before)}
    for name in names or (BASELINE, *changes):
        overrides = changes.get(name, [])
        params = load_params(run / "params.yaml", overrides)
        key = same_run | {"change": name, "settings_digest": settings_digest(params)}
        if any(key.items() <= row.items() for row in read_rows(ROWS)):
            print(f"{name}: already measured")
            continue
        stages = stages_to_run(before, params)
        found = rerun(run, params, stages, out / f"{params.preset}-{params.seed}-{name.replace(' ', '-')}")
        del found["training"], found["samples"]
        append_row(
            ROWS, key | {"settings": overrides, "revision": code_revision(), "machine": describe_machine()} | found
        )
    replace_section(LOG, before.preset, as_table([row for row in read_rows(ROWS) if same_run.items() <= row.items()]))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.effects")
