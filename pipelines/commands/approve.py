"""kfp-rlhf approve."""

from pathlib import Path

import click


@click.command("approve")
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--by", required=True, metavar="NAME", help="Who decides.")
@click.option("--why", required=True, metavar="TEXT", help="Reason, which is kept with the version.")
@click.option("--reject", is_flag=True, help="Reject the policy instead.")
@click.option(
    "--mlflow",
    "uri",
    envvar="MLFLOW_TRACKING_URI",
    show_envvar=True,
    metavar="URI",
    help="Address of the MLflow server of a run on a cluster.",
)
@click.option(
    "--model", default="kfp-rlhf", show_default=True, metavar="NAME", help="tracking.registered_model of that run."
)
def approve_command(run: str | None, by: str, why: str, uri: str | None, model: str, *, reject: bool) -> None:
    """Approve of the policy of a run that waits for a person (gate.approval), or reject it.

    RUN is a run directory, or the id of a run in Kubeflow Pipelines; the default is the newest run below runs/. Read the report first.
    docs/approval.md explains what follows.

    \b
      kfp-rlhf approve runs/quick-20260101-120000 --by Ann --why "answers read and compared"
      kfp-rlhf approve 5f0c6f0e-2c55-4d5f-9a4e-1a4b --by Ann --why "too terse" --reject --mlflow http://localhost:5000
    """
    from components.rlhf.text.errors import InputError
    from pipelines.local.approve import approve_directory, approve_run_id, make_answer

    answer = make_answer(approved=not reject, by=by, why=why)
    if run is None or Path(run).exists():
        click.echo(approve_directory(Path(run) if run else None, answer))
    elif uri:
        click.echo(approve_run_id(run, answer, uri=uri, model=model))
    else:
        raise InputError(
            f"{run[:200]} is no run directory; for a run on a cluster also pass the address of its MLflow server with --mlflow."
        )


COMMANDS = (approve_command,)
