"""The runs of MLflow: one parent run per pipeline run, and one nested run per stage.

The MLflow plugin of Kubeflow Pipelines 2.17 makes these runs itself and passes the nested one to each task in MLFLOW_RUN_ID
(backend/src/v2/common/plugins/mlflow/handler.go); such a run is joined, and no other is made.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from components.rlhf.config.params import Params
from components.rlhf.config.storage import SETTINGS_VARIABLE, TrackingConfig
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.answers import require_usable_file
from components.rlhf.tracking.summary import name_of
from components.rlhf.tracking.texts import database_file, equals, key_of

RUN_ID_TAG = "rlhf.run_id"
STAGE_TAG, ERROR_TAG, PARENT_TAG = "rlhf.stage", "rlhf.error", "mlflow.parentRunId"
NOTE_TAG, KIND_TAG = "mlflow.note.content", "mlflow.experimentKind"
TRAINING_KIND = (
    "custom_model_development"  # for which the UI of MLflow 3 opens an experiment with its runs and their curves
)
MANUAL_RUN_ID = "manual"  # of stages without RLHF_RUN_ID; they are unrelated to each other
MAX_PARAM_CHARS, MAX_TAG_CHARS = 6000, 5000  # the server's limits
EXPERIMENT_NOTE = (
    "RLHF runs: SFT, reward model, PPO or DPO, and a comparison with SFT that decides on promotion. A parent run is a run of the "
    "pipeline and has its settings, data sets, costs and result; the runs nested in it are its stages, with their curves."
)
UNFINISHED_NOTE = "Not finished: see its nested runs."
STAGE_NOTES = {
    "import_model": "Imports and checks the base model.",
    "prepare_data": "Cleans, splits and pairs the data.",
    "sft": "Fine-tunes the base model on demonstrations. final/heldout_loss is the loss on held-out ones, in nats per token.",
    "reward_model": "Trains a model of human preferences. final/heldout_accuracy is the share of held-out pairs ordered as people did.",
    "judge": "Prepares the judges of the evaluation, which training never sees.",
    "ppo": "Trains the SFT model against its rewards. See components/ppo/README.md for what each curve means, and what to do about it.",
    "dpo": "Trains the SFT model on preferences. See components/dpo/README.md for what each curve means, and what to do about it.",
    "evaluation": "Compares the policy with SFT on held-out prompts. win_rate is the share of prompts on which the judge prefers it.",
    "ppo_evaluation": "Compares PPO with SFT on held-out prompts; evaluation does so with DPO, and says which one goes to the gate.",
    "register": "Registers the policy in the model registry.",
}


@dataclass(frozen=True)
class OpenRun:
    client: Any
    id: str
    last_steps: Mapping[str, int] = field(default_factory=dict)  # metric -> last step that an earlier attempt logged


@dataclass(frozen=True)
class ParentRun:
    """The parent run of a pipeline run."""

    id: str
    experiment_id: str
    plugin_run: Any = None  # the nested run that Kubeflow Pipelines made for this task, if it did


def connect(uri: str) -> Any:
    """An MLflow client that gives up on an unreachable server in seconds instead of minutes."""
    require_usable_file(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the address is internal to the cluster
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import logging

    from mlflow import MlflowClient

    # After the import, which configures these loggers.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_run(
    config: TrackingConfig, run_id: str, stage: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> OpenRun:
    """The nested run of a stage: that of an earlier attempt if it has not finished, else a new one with these params and tags."""
    assert config.uri
    client = connect(config.uri)
    parent = find_parent_run(client, config, run_id)
    tags = {STAGE_TAG: stage, RUN_ID_TAG: f"{run_id}/{stage}", NOTE_TAG: STAGE_NOTES.get(stage, ""), **tags}
    if parent.plugin_run is not None:
        if parent.plugin_run.data.tags.get(RUN_ID_TAG):
            return _reopen(client, parent.plugin_run)
        id = parent.plugin_run.info.run_id
        set_tags(client, id, tags)
    else:
        if run_id != MANUAL_RUN_ID:  # resume the run of an earlier attempt at this stage, and with it the curves
            for earlier in find_runs(client, parent.experiment_id, f"{run_id}/{stage}"):
                if earlier.info.status != "FINISHED":
                    return _reopen(client, earlier)
        tags = {key: redact(value)[:MAX_TAG_CHARS] for key, value in tags.items() if value}
        run = client.create_run(parent.experiment_id, run_name=stage, tags={PARENT_TAG: parent.id, **tags})
        id = run.info.run_id
    log_params(client, id, params)
    return OpenRun(client, id)


def log_params(client: Any, id: str, params: Mapping[str, Any]) -> None:
    """Log nested settings as params with dotted keys. The server accepts 100 in a request, and no other value for one that it has."""
    from mlflow.entities import Param

    found = [Param(key_of(key), redact(str(value))[:MAX_PARAM_CHARS]) for key, value in flatten(params).items()]
    for start in range(0, len(found), 100):
        client.log_batch(id, params=found[start : start + 100])


def set_tags(client: Any, id: str, tags: Mapping[str, str]) -> None:
    """Set the tags of a run that have a text, 100 in a request."""
    from mlflow.entities import RunTag

    found = [RunTag(key_of(key), redact(value)[:MAX_TAG_CHARS]) for key, value in tags.items() if value]
    for start in range(0, len(found), 100):
        client.log_batch(id, tags=found[start : start + 100])


def _reopen(client: Any, run: Any) -> OpenRun:
    """Continue the run of an earlier attempt."""
    client.update_run(run.info.run_id, status="RUNNING")
    if ERROR_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, ERROR_TAG)
    return OpenRun(client, run.info.run_id, _last_steps(client, run))


def find_runs(client: Any, experiment_id: str, run_id: str) -> Iterator[Any]:
    """The runs whose tag rlhf.run_id is run_id, the newest first."""
    page, token = None, None
    while page is None or token:
        page = client.search_runs(
            [experiment_id], filter_string=equals(f"tags.`{RUN_ID_TAG}`", run_id), max_results=100, page_token=token
        )
        yield from (run for run in page if run.data.tags.get(RUN_ID_TAG) == run_id)
        token = page.token


def _last_steps(client: Any, run: Any) -> dict[str, int]:
    return {
        name: max(point.step for point in client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics
    }


def find_parent_run(client: Any, config: TrackingConfig, run_id: str) -> ParentRun:
    """The parent run with this run_id. The first stage creates it, unless Kubeflow Pipelines has, and logs the settings of the run."""
    plugin_run = _plugin_run(client)
    if plugin_run is not None:
        parent_id = plugin_run.data.tags[PARENT_TAG]
        if RUN_ID_TAG not in client.get_run(parent_id).data.tags:
            client.set_tag(parent_id, RUN_ID_TAG, run_id)
            log_params(client, parent_id, settings_of_run())
        return ParentRun(parent_id, plugin_run.info.experiment_id, plugin_run)
    experiment_id = _experiment_id(client, config)
    for run in find_runs(client, experiment_id, run_id):
        return ParentRun(str(run.info.run_id), experiment_id)
    tags = {
        RUN_ID_TAG: run_id,
        NOTE_TAG: UNFINISHED_NOTE,
        "mlflow.source.name": "kfp-rlhf",
        "mlflow.source.type": "PROJECT",
    }
    start, settings = int(time.time() * 1000), settings_of_run()
    run = client.create_run(experiment_id, start, run_name=name_of(settings, start) or run_id, tags=tags)
    log_params(client, run.info.run_id, settings)
    return ParentRun(str(run.info.run_id), experiment_id)


def settings_of_run() -> dict[str, Any]:
    """All settings of the pipeline run that this task is part of; {} for a stage on its own, or if this version cannot read them."""
    try:
        return Params.from_json(os.environ[SETTINGS_VARIABLE]).model_dump(mode="json")
    except (KeyError, ValueError):
        return {}


def _plugin_run(client: Any) -> Any:
    """The nested run in MLFLOW_RUN_ID, or None. A run without a parent is not one of the plugin."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return None
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        # A run of another server than tracking.uri, or not the id of a run at all.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if PARENT_TAG in run.data.tags else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _experiment_id(client: Any, config: TrackingConfig) -> str:
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        return _create_experiment(client, config)
    if KIND_TAG not in experiment.tags and experiment.lifecycle_stage == "active":
        client.set_experiment_tag(experiment.experiment_id, KIND_TAG, TRAINING_KIND)
    return str(experiment.experiment_id)


def _create_experiment(client: Any, config: TrackingConfig) -> str:
    file, location = database_file(config.uri or ""), None
    if file:  # next to the database; MLflow's default is the working directory
        location = (file.resolve().parent / "mlflow-files").as_uri()
    tags = {KIND_TAG: TRAINING_KIND, NOTE_TAG: EXPERIMENT_NOTE}
    try:
        return str(client.create_experiment(config.experiment, artifact_location=location, tags=tags))
    except Exception:  # another stage has created it concurrently
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            raise
        return str(experiment.experiment_id)
