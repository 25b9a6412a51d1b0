"""Say how the run ended: to MLflow and to a webhook. It runs last, whatever happened, and never fails a run."""

import os
import sys

import click

from components.rlhf.config.cluster import NotifyStage
from components.rlhf.config.storage import StorageSettings, TrackingSettings
from components.rlhf.edges.secrets import redact_output
from components.rlhf.edges.stage import RUN_ID, parse_settings, storage_option
from components.rlhf.errors import InputError


@click.command(help=__doc__)
@click.option("--status", required=True, help="KFP's final status of the run, as JSON.")
@click.option("--settings", required=True, help="Settings as JSON: preset, ui_url.")
@click.option("--tracking", default="{}", help="Tracking settings as JSON.")
@storage_option
def main(status: str, settings: str, tracking: str, storage: str) -> None:
    from components.notify.ending import clean_up, ending_of, message, send
    from components.rlhf.edges.tracking import close_parent, from_environment

    redact_output()
    stage = parse_settings(NotifyStage, settings)
    track = from_environment(parse_settings(TrackingSettings, tracking))
    run_id = os.environ.get(RUN_ID, "")
    ending = ending_of(status, track, run_id)
    print(f"[notify] {message(stage, ending)['text']}", flush=True)
    if run_id:
        close_parent(track, run_id=run_id, status=ending.mlflow_status, metrics={}, files=[])
        clean_up(parse_settings(StorageSettings, storage), ending)
    send(os.environ.get("RLHF_WEBHOOK_URL", ""), message(stage, ending))


if __name__ == "__main__":
    try:
        main(prog_name="python -m components.notify")
    except InputError as error:
        sys.exit(f"error: {error}")
