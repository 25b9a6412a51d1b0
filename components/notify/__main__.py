"""Report the final status of the run to MLflow and a webhook. Always runs last, and never fails a run."""

import os
import sys

import click

from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.runtime.memory import collect_old_objects_rarely
from components.rlhf.runtime.process import end_before_finalization
from components.rlhf.runtime.stage import RUN_ID, STORAGE_OPTION, TRACKING_OPTION, parse_config
from components.rlhf.runtime.termination import write_termination_message
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact_output


@click.command(help=__doc__)
@click.option("--status", required=True, help="KFP's final status of the run (PipelineTaskFinalStatus) as JSON.")
@click.option("--settings", required=True, help="NotifyStageConfig as JSON: preset, ui_url and params.")
@TRACKING_OPTION
@STORAGE_OPTION
def main(status: str, settings: str, tracking: str, storage: str) -> None:
    from components.notify.result import delete_checkpoints, delete_trainjobs, finish_tracking, get_result
    from components.notify.webhook import as_message, post
    from components.rlhf.tracking.mlflow import with_environment_uri
    from components.rlhf.tracking.parent import open_parent

    succeed = end_before_finalization(__name__)
    redact_output()
    collect_old_objects_rarely()
    config = parse_config(NotifyStageConfig, settings)
    tracking_config = with_environment_uri(parse_config(TrackingConfig, tracking))
    storage_config = parse_config(StorageConfig, storage)
    run_id = os.environ.get(RUN_ID, "")
    parent = open_parent(tracking_config, run_id)
    result = get_result(status, tracking_config, run_id, parent)
    message = as_message(config, result, mlflow_link=parent.link if parent else "")
    print(f"[notify] {message['text']}", flush=True)
    delete_trainjobs(result)
    delete_checkpoints(storage_config, result)
    if finish_tracking(parent, result, params=config.params):
        print("[notify] announced by an earlier attempt", flush=True)
    else:
        post(os.environ.get("RLHF_WEBHOOK_URL", ""), message, parent)
    succeed()


if __name__ == "__main__":
    try:
        main(prog_name="python -m components.notify")
    except InputError as error:
        write_termination_message(error)
        sys.exit(f"error: {error}")
