"""Every advantage estimator on random walks: `python -m benchmarks.estimators [--seeds N]`.

The task of tests/ppo/test_random_walks.py, with the same settings for all of them; the optimum is 1. It writes the table of
components/ppo/README.md.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

import click

from benchmarks.record import ROOT, describe_machine, replace_section
from components.rlhf.config.ppo import AdvantageEstimator
from tests.support.ppo_runs import trainer_of
from tests.support.random_walks import Walks, make_walks
from tests.support.walking import STARTS, make_imitator, mean_optimality, settings_of


def measure(advantage: AdvantageEstimator, seed: int, folder: Path, walks: Walks) -> tuple[float, float, float]:
    """CPU seconds of the training, and the mean optimality before and after it."""
    stage = settings_of(advantage, frozen=1).model_copy(update={"seed": seed})
    trainer = trainer_of(stage, folder / "sft", folder / "critic", reward=walks.reward)
    before = mean_optimality(trainer.rollout, walks)
    started = time.process_time()
    trainer.train(STARTS, [])
    return time.process_time() - started, before, mean_optimality(trainer.rollout, walks)


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Number of seeds of PPO; the SFT model is the same.")
def main(seeds: int) -> None:
    lines = ["| `advantage` | CPU seconds | mean optimality, SFT | after PPO |", "|---|---:|---:|---:|"]
    walks = make_walks()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_imitator(Path(temporary), walks)
        for advantage in get_args(AdvantageEstimator):
            runs = [measure(advantage, seed, folder, walks) for seed in range(seeds)]
            cpu, before, after = (list(column) for column in zip(*runs, strict=True))
            spread = f"{statistics.mean(after):.3f} ({min(after):.3f} to {max(after):.3f})"
            lines.append(f"| `{advantage}` | {statistics.mean(cpu):.1f} | {before[0]:.3f} | {spread} |")
    note = f"Mean over {seeds} seeds, with the range; 30 iterations of 128 walks, one of two layers frozen; {describe_machine()}."
    replace_section(ROOT / "components" / "ppo" / "README.md", "estimators", "\n".join([*lines, "", note]))
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
