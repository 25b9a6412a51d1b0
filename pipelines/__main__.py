"""RLHF as a Kubeflow pipeline: run it on this machine, compile it, or submit it to a cluster."""

import os
import signal
import sys

import click

from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact, redact_output
from pipelines.commands import annotate, approve, chat, checks, cluster, deliver, dev, init, results, run, status, sweep

DEBUG_VARIABLE = "KFP_RLHF_DEBUG"


@click.group(help=__doc__)
@click.version_option(package_name="kfp-rlhf")
@click.option("--debug", is_flag=True, envvar=DEBUG_VARIABLE, help="Show the traceback of an error.")
def cli(*, debug: bool) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


for module in (init, run, sweep, status, results, chat, annotate, approve, deliver, checks, cluster, dev):
    for command in module.COMMANDS:
        cli.add_command(command)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    redact_output()
    signal.signal(signal.SIGTERM, _interrupt)  # stop the running stage and write the summary
    try:
        cli()
    except InputError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        click.echo(f"error: {redact(str(error))}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
