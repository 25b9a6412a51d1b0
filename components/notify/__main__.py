"""Say how the run ended: to MLflow and to a webhook. It runs last, whatever happened, and never fails a run."""

import os
import sys

import click

from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.runtime.stage import RUN_ID, parse_config, storage_option
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact_output


@click.command(help=__doc__)
@click.option("--status", required=True, help="KFP's final status of the run, as JSON.")
@click.option("--settings", required=True, help="Settings as JSON: preset, ui_url.")
@click.option("--tracking", default="{}", help="Tracking settings as JSON.")
@storage_option
def main(status: str, settings: str, tracking: str, storage: str) -> None:
    from components.notify.outcome import clean_up, determine_outcome, message, send
    from components.rlhf.tracking.mlflow import finish_parent_run, with_environment_uri

    redact_output()
    stage = parse_config(NotifyStageConfig, settings)
    track = with_environment_uri(parse_config(TrackingConfig, tracking))
    run_id = os.environ.get(RUN_ID, "")
    outcome = determine_outcome(status, track, run_id)
    print(f"[notify] {message(stage, outcome)['text']}", flush=True)
    if run_id:
        finish_parent_run(track, run_id=run_id, status=outcome.mlflow_status, metrics={}, files=[])
        clean_up(parse_config(StorageConfig, storage), outcome)
    send(os.environ.get("RLHF_WEBHOOK_URL", ""), message(stage, outcome))


if __name__ == "__main__":
    try:
        main(prog_name="python -m components.notify")
    except InputError as error:
        sys.exit(f"error: {error}")
