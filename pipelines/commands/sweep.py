"""kfp-rlhf sweep."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from components.rlhf.text.errors import InputError
from pipelines.commands.options import DEFAULT_PARAMS, JSON_OPTION, SET_OPTION, server_options


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
@click.option("--seed", type=int, metavar="S", help="Seed of --random; that of the runs is --set seed=S. [default: 0]")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to create. [default: runs/sweep-PRESET-TIME]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with the sweep in DIR.")
@click.option("--table", type=click.Path(path_type=Path), metavar="DIR", help="Only show the results in DIR so far.")
@JSON_OPTION
@server_options
@click.option("--experiment", metavar="NAME", default="rlhf", show_default=True, help="KFP experiment of the runs.")
@click.option("--name", metavar="NAME", help="First part of the names of the runs, or name of Katib's Experiment.")
@click.option("--wait", is_flag=True, help="Run one point after the other, so that they share stages in KFP's cache.")
@click.option("--kube-context", metavar="NAME", help="kubectl context, as for submit. [default: the current context]")
@click.option("--katib", type=click.Path(path_type=Path), metavar="FILE", help="Write an Experiment of Katib instead.")
@click.option("--image", metavar="IMAGE", help="With --katib: an image with the command kfp-rlhf.")
def sweep_command(
    params_file: Path | None,
    resume: Path | None,
    table: Path | None,
    server: Callable[[], Any],
    *,
    out: Path | None,
    as_json: bool,
    wait: bool,
    katib: Path | None,
    image: str | None,
    experiment: str,
    name: str | None,
    kube_context: str | None,
    **planned: Any,
) -> None:
    """Run the pipeline with many settings, and compare the results.

    Every point is a run directory in the directory of the sweep. Stages that are the same at several points, with the same settings and
    inputs, run once. All points are validated before the first one runs. With --host in the command, every point is submitted to Kubeflow
    Pipelines instead.

    \b
      kfp-rlhf sweep my.yaml --grid ppo.kl_coef=0.02,0.05 --grid seed=0,1,2
      kfp-rlhf sweep my.yaml --random 12 --range ppo.training.learning_rate=1e-6..1e-4:log
      kfp-rlhf sweep --resume runs/sweep-quick-20260101-120000
      kfp-rlhf sweep my.yaml --grid ppo.kl_coef=0.02,0.05 --host http://localhost:8080 --wait
    """
    is_submitted = click.get_current_context().get_parameter_source("host") is ParameterSource.COMMANDLINE
    _refuse_mixtures(is_submitted or katib is not None, params_file, planned, out=out, resume=resume, table=table)
    with_host = is_submitted and katib is None
    for option, value, needed, has_effect in (
        ("--wait", wait, "--host in the command, without --katib", with_host),
        ("--kube-context", kube_context, "--host in the command, without --katib", with_host),
        ("--name", name, "--host in the command, or --katib", is_submitted or katib),
        ("--image", image, "--katib", katib),
    ):
        if value and not has_effect:
            raise InputError(f"{option} needs {needed}; add that, or remove {option}.")
    if katib:
        _write_katib(katib, params_file, planned, server(), image=image, name=name)
    elif is_submitted:
        sys.exit(
            _submit(
                params_file, planned, server(), wait=wait, experiment=experiment, name=name, kube_context=kube_context
            )
        )
    else:
        sys.exit(_run(params_file, planned, out=out, resume=resume, table=table, as_json=as_json))


def _refuse_mixtures(
    is_on_cluster: bool,
    params_file: Path | None,
    planned: Mapping[str, Any],
    *,
    out: Path | None,
    resume: Path | None,
    table: Path | None,
) -> None:
    """Raise InputError for arguments that do not go together."""
    if is_on_cluster and (out or resume or table):
        raise InputError(
            "--out, --resume and --table are for sweeps on this machine; remove them, or --host and --katib."
        )
    if planned["seed"] is not None and planned["num_random"] is None:
        raise InputError(
            "--seed is that of --random; set the seed of the runs with --set seed=S, or vary it with --grid."
        )
    if resume and table:
        raise InputError("--resume shows the table at its end; remove --table.")
    option = "--resume" if resume else "--table" if table else ""
    if option and (params_file or out or any(planned[key] for key in ("overrides", "grids", "ranges", "num_random"))):
        raise InputError(f"{option} uses the points in the directory of the sweep; remove all other arguments.")


def _axes(planned: Mapping[str, Any]) -> list[Any]:
    from pipelines.sweep import parse_grid, parse_range

    return [*map(parse_grid, planned["grids"]), *map(parse_range, planned["ranges"])]


def _points(params_file: Path | None, planned: Mapping[str, Any]) -> list[Any]:
    from pipelines.sweep import plan_points

    random = {"num_random": planned["num_random"], "seed": planned["seed"] or 0}
    return plan_points(params_file or DEFAULT_PARAMS, planned["overrides"], _axes(planned), **random)


def _run(
    params_file: Path | None,
    planned: Mapping[str, Any],
    *,
    out: Path | None,
    resume: Path | None,
    table: Path | None,
    as_json: bool,
) -> int:
    """Run, resume or only show a sweep on this machine."""
    from rich.console import Console

    progress = Console(file=sys.stderr if as_json else sys.stdout)  # opened first: stdout is redirected during runs
    if table:
        _show(table, as_json=as_json)
        return 0
    from pipelines.local.run import default_run_dir
    from pipelines.local.sweep import create_sweep, crown, run_sweep
    from pipelines.local.sweep_results import champion_of, read_results

    folder = resume
    if folder is None:
        points = _points(params_file, planned)
        default = default_run_dir(points[0].params)
        folder = out or default.with_name(f"sweep-{default.name}")
        create_sweep(points, folder)
    errors = run_sweep(folder, progress)
    _show(folder, as_json=as_json)
    if not errors and (champion := champion_of(read_results(folder))) and (version := crown(Path(champion.run))):
        progress.print(
            f"The alias champion in MLflow is at version {version}, that of {champion.name}.", soft_wrap=True
        )
    if errors:
        program = click.get_current_context().find_root().command_path
        progress.print(f"go on with: {program} sweep --resume {shlex.quote(str(folder))}", soft_wrap=True, markup=False)
    return 1 if errors else 0


def _submit(params_file: Path | None, planned: Mapping[str, Any], access: Any, *, wait: bool, **options: Any) -> int:
    from pipelines.cluster.submit import SubmitOptions
    from pipelines.cluster.sweep import submit_points

    points = _points(params_file, planned)
    options["name"] = options["name"] or f"{points[0].params.preset} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    return submit_points(points, access, SubmitOptions(**options), click.echo, one_by_one=wait)


def _write_katib(
    file: Path,
    params_file: Path | None,
    planned: Mapping[str, Any],
    access: Any,
    *,
    image: str | None,
    name: str | None,
) -> None:
    from pipelines.cluster.katib import experiment_manifests
    from pipelines.settings import load_params

    if not image:
        raise InputError("--katib needs --image: an image with the command kfp-rlhf, in which its trials run.")
    text = experiment_manifests(
        load_params(params_file or DEFAULT_PARAMS, planned["overrides"]),
        _points(params_file, planned),
        _axes(planned),
        access,
        name=name or "rlhf-sweep",
        image=image,
        is_random=planned["num_random"] is not None,
    )
    file.write_text(text, encoding="utf-8")
    click.echo(f"wrote {file}; start the trials with: kubectl create -f {shlex.quote(str(file))}")


def _show(folder: Path, *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console

    from pipelines.local.sweep_results import advice, champion_of, read_results, sweep_table

    results = read_results(folder)
    if as_json:
        champion = champion_of(results)
        points = [asdict(result) for result in results]
        click.echo(json.dumps({"points": points, "champion": champion.name if champion else None}, indent=2))
        return
    console = Console(file=sys.stdout)
    console.print(sweep_table(results))
    for line in advice(results, click.get_current_context().find_root().command_path):
        console.print(line, soft_wrap=True, markup=False)


COMMANDS = (sweep_command,)
