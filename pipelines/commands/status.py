"""Commands that watch a run: status and logs."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from components.rlhf.text.errors import InputError
from pipelines.commands.options import JSON_OPTION, access_to, server_options

RUN_OR_ID = click.argument("run", metavar="[RUN]", required=False)
KUBE_CONTEXT = click.option(
    "--kube-context", metavar="NAME", help="kubectl context that reads the logs of pods. [default: the current context]"
)
FOLLOW_SECONDS = 1.0


@click.command("status")
@RUN_OR_ID
@click.option("--follow", "-f", is_flag=True, help="Show it until the run ends; exit with 1 unless it succeeded.")
@JSON_OPTION
@server_options
def status_command(run: str | None, server: Callable[[], Any] | None, *, follow: bool, as_json: bool) -> None:
    """Show the tasks of a run, what they are doing, and how long they have taken.

    RUN is a run directory, or with --host the id of a run in Kubeflow Pipelines; the default is the newest run below runs/.

    \b
      kfp-rlhf status --follow
      kfp-rlhf status 5f0c6f0e-2c55-4d5f-9a4e-1a4b --host http://localhost:8080
    """
    import json

    from rich.console import Console
    from rich.live import Live

    from pipelines.local.live import state_table
    from pipelines.run_state import ENDED

    read = state_reader(run, server)
    console, state = Console(file=sys.stdout), read()
    if follow and console.is_terminal and not as_json:
        with Live(state_table(state), console=console, auto_refresh=False, transient=True) as live:
            while state.state not in ENDED:
                time.sleep(FOLLOW_SECONDS)
                state = read()
                live.update(state_table(state), refresh=True)
    told: dict[str, str] = {}
    while follow and state.state not in ENDED:
        for line in () if as_json else news(state, told):
            click.echo(line)
        time.sleep(FOLLOW_SECONDS)
        state = read()
    if as_json:
        click.echo(json.dumps(asdict(state), indent=2))
    else:
        console.print(state_table(state))
    if follow:
        sys.exit(0 if state.state == "succeeded" else 1)


def news(state: Any, told: dict[str, str]) -> Iterator[str]:
    """A line for each task that has begun and whose state or progress is not the one in told, which is updated."""
    for task in state.tasks:
        text = f"[{task.name}] {task.state}" + (f": {task.line}" if task.line else "")
        if task.state not in ("waiting", "skipped") and told.get(task.name) != text:
            told[task.name] = text
            yield text


@click.command("logs")
@RUN_OR_ID
@click.argument("task", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on until the task ends (runs on this machine).")
@click.option("--tail", "num_lines", type=click.IntRange(min=1), metavar="N", help="Only the last N lines.")
@KUBE_CONTEXT
@server_options
def logs_command(
    run: str | None,
    task: str | None,
    num_lines: int | None,
    kube_context: str | None,
    server: Callable[[], Any] | None,
    *,
    follow: bool,
) -> None:
    """Print the log of a task of a run, such as ppo.

    RUN is as for status. The default task is the one that started last.

    \b
      kfp-rlhf logs runs/quick-20260101-120000 ppo --tail 20
      kfp-rlhf logs 5f0c6f0e-2c55-4d5f-9a4e-1a4b ppo --host http://localhost:8080
    """
    if run is not None and not Path(run).exists():
        from pipelines.cluster.state import pod_logs
        from pipelines.cluster.submit import DEFAULT_NAMESPACE

        if task is None:
            raise InputError(f"Name the task of run {run} whose log you want, such as ppo.")
        for text in pod_logs(access_to(server).namespace or DEFAULT_NAMESPACE, run, task, kube_context):
            click.echo("\n".join(text.splitlines()[-(num_lines or 0) :]))
        return
    from pipelines.local.run_dir import find_run, follow_log, log_of, tail_lines

    folder = find_run(Path(run) if run else None)
    log = log_of(folder, task)
    text = tail_lines(log, num_lines)
    click.echo(text, nl=False)
    if follow:
        for line in follow_log(folder, log):
            click.echo(line, nl=False)


def state_reader(run: str | None, server: Callable[[], Any] | None) -> Callable[[], Any]:
    """A function that reads the state of a run: of a directory, or by the id of a run on a cluster."""
    from pipelines.local.run_dir import find_run, read_state

    if run is None or Path(run).exists():
        folder = find_run(Path(run) if run else None)
        return lambda: read_state(folder)
    from pipelines.cluster.server import connect
    from pipelines.cluster.state import read_cluster_state
    from pipelines.compile import stage_names

    access = access_to(server)
    connected, stages = connect(access), stage_names()
    return lambda: read_cluster_state(connected, access, run, stages)


COMMANDS = (status_command, logs_command)
