"""kfp-rlhf sweep."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from components.rlhf.text.errors import InputError
from pipelines.commands.options import DEFAULT_PARAMS, JSON_OPTION, SET_OPTION


@click.command("sweep")
@click.argument("params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), required=False)
@SET_OPTION
@click.option("--grid", "grids", multiple=True, metavar="KEY=VALUE,VALUE", help="Vary a parameter over these values.")
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="KEY=LOW..HIGH[:log]",
    help="With --random, vary a parameter from LOW to HIGH; with :log, uniformly in its logarithm.",
)
@click.option("--random", "num_random", type=int, metavar="N", help="Draw N points. [default: all combinations]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --random; the runs keep their own.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to create. [default: runs/sweep-PRESET-TIME]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the sweep in DIR.")
@click.option("--table", type=click.Path(path_type=Path), metavar="DIR", help="Only show the results in DIR so far.")
@JSON_OPTION
def sweep_command(
    params_file: Path | None,
    resume: Path | None,
    table: Path | None,
    *,
    as_json: bool,
    **planned: Any,
) -> None:
    """Run the pipeline with many settings, and compare the results.

    Every point is a run directory in the directory of the sweep. Stages that are the same at several points, with the same settings and
    inputs, run once. All points are validated before the first one runs.

    \b
      kfp-rlhf sweep my.yaml --grid ppo.kl_coef=0.02,0.05 --grid seed=0,1,2
      kfp-rlhf sweep my.yaml --random 12 --range ppo.training.learning_rate=1e-6..1e-4:log
      kfp-rlhf sweep --resume runs/sweep-quick-20260101-120000
    """
    from rich.console import Console

    progress = Console(file=sys.stderr if as_json else sys.stdout)  # opened first: stdout is redirected during runs
    if resume or table:
        _refuse_plan(params_file, planned, "--resume" if resume else "--table")
        if resume and table:
            raise InputError("--resume shows the table at its end; remove --table.")
    folder = table or resume or _plan(params_file, **planned)
    errors: dict[str, str] = {}
    if not table:
        from pipelines.local.sweep import run_sweep

        errors = run_sweep(folder, progress)
    _show(folder, as_json=as_json)
    if errors:
        program = click.get_current_context().find_root().command_path
        progress.print(f"go on with: {program} sweep --resume {folder}", soft_wrap=True, markup=False)
    sys.exit(1 if errors else 0)


def _refuse_plan(params_file: Path | None, planned: dict[str, Any], option: str) -> None:
    given = [name for name in ("overrides", "grids", "ranges", "num_random", "out") if planned[name]]
    if params_file or given:
        raise InputError(f"{option} uses the points in the directory of the sweep; remove all other arguments.")


def _plan(
    params_file: Path | None,
    *,
    overrides: Sequence[str],
    grids: Sequence[str],
    ranges: Sequence[str],
    num_random: int | None,
    seed: int,
    out: Path | None,
) -> Path:
    """Write the plan of a new sweep, and return its directory."""
    from pipelines.local.run import default_run_dir
    from pipelines.local.sweep import create_sweep
    from pipelines.sweep import parse_grid, parse_range, plan_points

    axes = [*map(parse_grid, grids), *map(parse_range, ranges)]
    points = plan_points(params_file or DEFAULT_PARAMS, overrides, axes, num_random=num_random, seed=seed)
    default = default_run_dir(points[0].params)
    folder = out or default.with_name(f"sweep-{default.name}")
    create_sweep(points, folder)
    return folder


def _show(folder: Path, *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console

    from pipelines.local.sweep_results import advice, read_results, sweep_table

    results = read_results(folder)
    if as_json:
        click.echo(json.dumps({"points": [asdict(result) for result in results]}, indent=2))
        return
    console = Console(file=sys.stdout)
    console.print(sweep_table(results))
    for line in advice(results, click.get_current_context().find_root().command_path):
        console.print(line, soft_wrap=True, markup=False)


COMMANDS = (sweep_command,)
