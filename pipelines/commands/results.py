"""Commands that show the results of runs on this machine: report, ui and compare."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from components.rlhf.text.errors import InputError
from pipelines.commands.options import JSON_OPTION, RUN_ARGUMENT


@click.command("report")
@RUN_ARGUMENT
@click.option("--no-open", is_flag=True, help="Only print the path.")
def report_command(run: Path | None, *, no_open: bool) -> None:
    """Open the report of a run in the browser, and print its path.

    RUN is a run directory; the default is the newest run below runs/.

    \b
      kfp-rlhf report runs/quick-20260101-120000
    """
    from pipelines.local.run_dir import find_run

    folder = find_run(run)
    page = (folder / "report.html").resolve()
    if not page.is_file():
        raise InputError(
            f"{folder} has no report yet; kfp-rlhf status {folder} shows how far it is, kfp-rlhf run --resume {folder} goes on."
        )
    click.echo(page)
    if not no_open and has_browser():
        click.launch(page.as_uri())


@click.command("ui")
@RUN_ARGUMENT
@click.option("--port", type=click.IntRange(1, 65_535), default=5000, show_default=True, help="Port of the server.")
@click.option("--no-open", is_flag=True, help="Open no browser.")
def ui_command(run: Path | None, port: int, *, no_open: bool) -> None:
    """Start the MLflow UI on the tracking database of a run. Ctrl-C stops it.

    RUN is a run directory; the default is the newest run below runs/. Runs in one folder share a database.

    \b
      kfp-rlhf ui --port 5001
    """
    from components.rlhf.config.storage import TrackingConfig
    from components.rlhf.tracking.parent import experiment_link
    from pipelines.local.run_dir import find_run, read_json, read_params
    from pipelines.local.web import page_when_ready, require_free_port

    folder = find_run(run)
    uri = str(read_json(folder / "run.json").get("tracking_uri") or "")
    if not uri:
        raise InputError(
            f"{folder} has been run without MLflow; set tracking.enabled and tracking.uri for the next one."
        )
    tracking = TrackingConfig.model_validate({**(read_params(folder).get("tracking") or {}), "uri": uri})
    if uri.startswith(("http://", "https://")):
        link = experiment_link(tracking, tracking.ui_url or uri)
        click.echo(link)
        if not no_open and has_browser():
            click.launch(link)
        return
    require_free_port(port)
    address = f"http://127.0.0.1:{port}"
    click.echo("Starting MLflow …")
    server = ["mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", *server], stdout=log, stderr=subprocess.STDOUT)
        try:
            if page_when_ready(process, address):
                link = experiment_link(tracking, address)
                click.echo(f"MLflow is at {link}\nPress Ctrl-C to stop it.")
                if not no_open and has_browser():
                    click.launch(link)
            if code := process.wait():
                log.seek(0)
                click.echo(log.read().decode(errors="replace"), err=True)
            sys.exit(code)
        except KeyboardInterrupt:
            pass
        finally:
            process.terminate()
            process.wait()


@click.command("compare")
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@JSON_OPTION
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Also write an HTML page.")
def compare_command(runs: tuple[Path, ...], html: Path | None, *, as_json: bool, markdown: bool) -> None:
    """Show how runs differ: results, parameters and times side by side.

    \b
      kfp-rlhf compare runs/quick-20260101-120000 runs/quick-20260102-120000 --html compare.html
    """
    import json
    from dataclasses import asdict

    from rich.console import Console

    from pipelines.local.compare import as_html, as_markdown, compare_runs
    from pipelines.local.display import print_comparison

    if len(runs) < 2:
        raise InputError("Pass at least two run directories to compare.")
    comparison = compare_runs(runs)
    if html:
        html.write_text(as_html(comparison), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(asdict(comparison), indent=2))
    elif markdown:
        click.echo(as_markdown(comparison), nl=False)
    else:
        print_comparison(comparison, Console(file=sys.stdout))


def has_browser() -> bool:
    """Whether a browser could be shown: on Linux only with a display."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


COMMANDS = (report_command, ui_command, compare_command)
