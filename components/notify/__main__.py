"""Report the final status of the run to MLflow and a webhook. Always runs last, and never fails a run."""

import os
import sys

import click

from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.runtime.stage import RUN_ID, STORAGE_OPTION, TRACKING_OPTION, parse_config
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact_output


@click.command(help=__doc__)
@click.option("--status", required=True, help="KFP's final status of the run (PipelineTaskFinalStatus) as JSON.")
@click.option("--settings", required=True, help="NotifyStageConfig as JSON: preset and ui_url.")
@TRACKING_OPTION
@STORAGE_OPTION
def main(status: str, settings: str, tracking: str, storage: str) -> None:
    from components.notify.result import as_message, delete_checkpoints, get_result, post
    from components.rlhf.tracking.mlflow import finish_parent_run, with_environment_uri

    redact_output()
    tracking_config = with_environment_uri(parse_config(TrackingConfig, tracking))
    run_id = os.environ.get(RUN_ID, "")
    result = get_result(status, tracking_config, run_id)
    message = as_message(parse_config(NotifyStageConfig, settings), result)
    print(f"[notify] {message['text']}", flush=True)
    if run_id:
        finish_parent_run(tracking_config, run_id=run_id, status=result.mlflow_status, metrics={}, files=[])
        delete_checkpoints(parse_config(StorageConfig, storage), result)
    post(os.environ.get("RLHF_WEBHOOK_URL", ""), message)


if __name__ == "__main__":
    try:
        main(prog_name="python -m components.notify")
    except InputError as error:
        sys.exit(f"error: {error}")
