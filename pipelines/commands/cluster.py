"""Commands for a cluster: compile, submit and budget."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from components.rlhf.text.errors import InputError
from pipelines.commands.options import PARAMS_ARGUMENT, SET_OPTION, access_to, server_options


@click.command("compile")
@PARAMS_ARGUMENT
@SET_OPTION
@click.option(
    "--out", type=click.Path(path_type=Path), default="pipeline.yaml", show_default=True, help="File to write."
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["ir", "manifests"]),
    default="ir",
    show_default=True,
    help="ir: KFP IR YAML for the KFP API and UI; manifests: a Pipeline and a PipelineVersion object for kubectl apply.",
)
@click.option("--namespace", help="Namespace of the manifests.")
def compile_command(
    params_file: Path, overrides: tuple[str, ...], out: Path, output_format: str, namespace: str | None
) -> None:
    """Compile the pipeline of a params file to YAML.

    \b
      kfp-rlhf compile my.yaml --out my-pipeline.yaml
    """
    from pipelines.compile import compile_manifests, compile_pipeline
    from pipelines.placement import require_allowed_code, require_checkpoints_for_budget, require_place_for_approval
    from pipelines.settings import load_params

    params = load_params(params_file, overrides)
    require_checkpoints_for_budget(params)
    require_place_for_approval(params)
    require_allowed_code(params)
    if output_format == "ir":
        compile_pipeline(params, out)
    else:
        compile_manifests(params, out, namespace=namespace)
    click.echo(f"wrote {out}")


@click.command("submit")
@PARAMS_ARGUMENT
@SET_OPTION
@server_options
@click.option("--experiment", metavar="NAME", default="rlhf", show_default=True, help="KFP experiment of the run.")
@click.option("--name", metavar="NAME", help="Name of the run. [default: PRESET TIME]")
@click.option("--wait", is_flag=True, help="Wait until the run ends; exit with 1 unless it succeeded.")
@click.option(
    "--recurring",
    "cron",
    metavar="CRON",
    help='Create a recurring run with this schedule instead: six fields, seconds first, such as "0 0 3 * * *".',
)
@click.option(
    "--dry-run", is_flag=True, help="Show the differences from the latest uploaded version, and change nothing."
)
@click.option(
    "--kube-context",
    metavar="NAME",
    help='kubectl context for checking Secrets and volumes, and with --wait pending pods; "" uses none. [default: the current context]',
)
def submit_command(
    params_file: Path,
    overrides: tuple[str, ...],
    server: Callable[[], Any] | None,
    *,
    wait: bool,
    dry_run: bool,
    **run_options: str | None,
) -> None:
    """Upload the pipeline of a params file to Kubeflow Pipelines as a named version, and run it.

    Parameters, local data, the server, your permissions, and the Secrets, ServiceAccount and volumes of the tasks are checked before
    anything is created. Local models and data are uploaded to storage.uri.

    \b
      kubectl -n kubeflow port-forward service/ml-pipeline-ui 8080:80 &
      kfp-rlhf submit my.yaml --host http://localhost:8080 --dry-run
    """
    from pipelines.cluster import submit
    from pipelines.settings import load_params

    access = access_to(server)
    params, options = load_params(params_file, overrides), submit.SubmitOptions(**run_options)
    if wait and options.cron:
        raise InputError("--wait cannot be used with --recurring, which has no end to wait for; remove one of them.")
    if dry_run:
        submit.dry_run(params, access, options, click.echo)
        return
    connected, run_id = submit.submit(params, access, options, click.echo)
    if wait:
        from pipelines.cluster.evaluation import metric_lines

        code = submit.wait(connected, access, run_id, options, click.echo)
        for line in metric_lines(params, run_id) if code == 0 else ():
            click.echo(line)
        sys.exit(code)


@click.command("budget")
@click.argument("folder", metavar="STORE/run-ID")
@click.argument("amount", type=click.FloatRange(min=0, min_open=True))
def budget_command(folder: str, amount: float) -> None:
    """Replace cluster.budget of one run, whose checkpoints are in this folder or s3://BUCKET/PREFIX/run-ID.

    It applies within a minute to stages that run, and to those that start: retry a run that has stopped at its budget in the UI of
    Kubeflow Pipelines. Its other parameters cannot change.

    \b
      kfp-rlhf budget s3://models/checkpoints/run-5f0c6f0e-2c55-4d5f-9a4e-1a4b 200
    """
    from components.rlhf.checkpoints.spend import set_budget
    from components.rlhf.storage.store import open_store

    store, _, run_folder = folder.rstrip("/").rpartition("/")
    spent = set_budget(open_store(store or "."), run_folder, amount)
    click.echo(f"the budget of {run_folder} is {amount:g}; {spent:.2f} has been spent")


COMMANDS = (compile_command, submit_command, budget_command)
