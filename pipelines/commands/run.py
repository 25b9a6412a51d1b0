"""kfp-rlhf run."""

import shlex
import sys
from pathlib import Path

import click

from components.rlhf.text.errors import InputError
from pipelines.commands.options import DEFAULT_PARAMS, SET_OPTION


@click.command()
@click.argument("params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), required=False)
@SET_OPTION
@click.option("--out", type=click.Path(path_type=Path), help="Run directory to create. [default: runs/PRESET-TIME]")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Resume the run in this directory; finished stages are verified and reused. Only --set cluster.budget=... may be given with it.",
)
def run(params_file: Path | None, overrides: tuple[str, ...], out: Path | None, resume: Path | None) -> None:
    """Run the whole pipeline on this machine.

    PARAMS is a params file; the default is the movie-review task that comes with kfp-rlhf.

    \b
      kfp-rlhf run my.yaml --set ppo.num_iterations=4
      kfp-rlhf run --resume runs/quick-20260101-120000
    """
    from rich.console import Console

    from pipelines.local.display import print_summary
    from pipelines.local.run import default_run_dir, default_tracking_uri, resume_pipeline, run_pipeline
    from pipelines.settings import load_params

    console = Console(file=sys.stdout)  # opened first, because stdout is redirected during the run
    if resume:
        if params_file or out:
            raise InputError(
                "--resume uses the parameters in the run directory; remove PARAMS and --out from the command."
            )
        summary = resume_pipeline(resume, console=console, overrides=overrides)
    else:
        params = load_params(params_file or DEFAULT_PARAMS, overrides)
        run_dir = out or default_run_dir(params)
        tracking_uri = default_tracking_uri(run_dir, in_run_dir=out is not None)
        summary = run_pipeline(params, run_dir, tracking_uri=tracking_uri, console=console)
    print_summary(console, summary)
    if summary["status"] != "succeeded":
        program = click.get_current_context().find_root().command_path
        console.print(
            f"resume with: {program} run --resume {shlex.quote(str(resume or run_dir))}", soft_wrap=True, markup=False
        )
    sys.exit(0 if summary["status"] == "succeeded" else 1)


COMMANDS = (run,)
