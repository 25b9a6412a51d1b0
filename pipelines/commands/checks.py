"""Commands that look before a run starts: plan, data, check-model and doctor."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipelines.commands.options import JSON_OPTION, PARAMS_ARGUMENT, SET_OPTION, server_options


@click.command("plan")
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

    \b
      kfp-rlhf plan my.yaml --set cluster.default_profile=gpu-24gb
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


@click.command("data")
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

    \b
      kfp-rlhf data my.yaml --html data.html
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


@click.command("check-model")
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

    \b
      kfp-rlhf check-model ./my-model --chat
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


@click.command("doctor")
@click.argument("params_file", metavar="[PARAMS]", type=click.Path(path_type=Path), required=False)
@SET_OPTION
@JSON_OPTION
@server_options
def doctor_command(
    params_file: Path | None, overrides: tuple[str, ...], server: Callable[[], Any] | None, *, as_json: bool
) -> None:
    """Show what this machine can run: torch and its GPUs, the NVIDIA driver, disk, memory, and programs for a cluster.

    With a params file also whether its data, S3 and its MLflow server can be reached, and with --host Kubeflow Pipelines. Exits with 1
    if there is a problem.

    \b
      kfp-rlhf doctor my.yaml --host http://localhost:8080
    """
    import json
    from dataclasses import asdict

    from pipelines.local.doctor import check_server, checks, checks_of_run
    from pipelines.settings import load_params

    found = list(checks(Path.cwd()))
    if params_file:
        found += checks_of_run(load_params(params_file, overrides))
    if server:
        found.append(check_server(server))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in found], indent=2))
    else:
        for check in found:
            click.echo(f"{check.status:8} {check.name:10} {check.text}")
    sys.exit(1 if "problem" in {check.status for check in found} else 0)


COMMANDS = (plan_command, data_command, check_model_command, doctor_command)
