"""The end of a pipeline run in MLflow: what its parent run shows of the stages, wherever the run took place."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking.answers import warn
from components.rlhf.tracking.registry import find_version
from components.rlhf.tracking.runs import (
    ERROR_TAG,
    NOTE_TAG,
    PARENT_TAG,
    STAGE_TAG,
    ParentRun,
    connect,
    find_parent_run,
    flatten,
    log_params,
    set_tags,
)
from components.rlhf.tracking.summary import Cost, cost_of, name_of, note_of, parse_settings, tags_of
from components.rlhf.tracking.tables import LOGGED_TABLES_TAG
from components.rlhf.tracking.texts import equals, key_of, link_to

FINAL = "final/"  # prefix of the final metrics of a stage in its nested run
SUMMARIZED_STAGE = "evaluation"  # its metrics and reports are those of the run
FIRST_EVALUATION = "ppo_evaluation"  # of a run with two policies
GOES_TO_GATE = "goes_to_gate"  # metric of the second evaluation: 1 if the gate takes its policy, 0 if that of the first
NOTIFIED_TAG = "rlhf.notified"
COST_LINE = "Cost of the run: "  # in the description of a version
STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "canceled": "KILLED"}  # of a run -> of its parent run


@dataclass(frozen=True)
class StageResult:
    """One nested run."""

    name: str
    status: str  # MLflow's: RUNNING, FINISHED, FAILED or KILLED
    seconds: float
    error: str
    metrics: Mapping[str, float]  # final metrics
    mlflow_run_id: str


class Parent:
    """The parent run of a pipeline run."""

    def __init__(self, client: Any, config: TrackingConfig, run: ParentRun) -> None:
        self._client, self._config, self._run = client, config, run

    @property
    def link(self) -> str:
        """Where people look at the run, or "" if MLflow has no web address."""
        return self._page(self._run.id)

    def report_link(self) -> str:
        """Where people find the report of the evaluation that decides before the run has ended, or "". Errors are warnings."""
        try:
            evaluation = deciding_evaluation(self.stages())
            return self._page(evaluation.mlflow_run_id, "artifacts") if evaluation else ""
        except Exception as error:  # MLflow must not fail a run
            warn(error, self._config)
            return ""

    def _page(self, id: str, tab: str = "") -> str:
        uri = self._config.ui_url or self._config.uri or ""
        return link_to(uri, self._run.experiment_id, id, tab=tab) if uri.startswith("http") else ""

    def stages(self) -> list[StageResult]:
        """The nested runs, in the order of their start."""
        return [
            StageResult(
                name=run.data.tags[STAGE_TAG],
                status=run.info.status,
                seconds=max(0.0, ((run.info.end_time or run.info.start_time) - run.info.start_time) / 1000),
                error=run.data.tags.get(ERROR_TAG, ""),
                metrics={n.removeprefix(FINAL): v for n, v in run.data.metrics.items() if n.startswith(FINAL)},
                mlflow_run_id=run.info.run_id,
            )
            for run in self._nested_runs()
        ]

    def _nested_runs(self) -> list[Any]:
        runs = self._client.search_runs(
            [self._run.experiment_id],
            filter_string=equals(f"tags.`{PARENT_TAG}`", self._run.id),
            order_by=["attributes.start_time ASC"],
            max_results=1000,
        )
        return [run for run in runs if STAGE_TAG in run.data.tags]

    def finish(self, *, status: str, stages: Sequence[StageResult], facts: Mapping[str, str], params: str) -> None:
        """End the parent run with the final metrics of its stages, its settings, data sets, costs, description and reports.

        The metrics of the evaluation keep their names, in a run with two policies those of the one that goes to the gate; those of other
        stages are STAGE/NAME. facts are added to summary.json.
        """
        evaluation = deciding_evaluation(stages)
        self._log_metrics(stages, evaluation)
        numbers = dict(evaluation.metrics) if evaluation else {}
        summary = {
            "status": status,
            **facts,
            "stages": [{k: v for k, v in asdict(stage).items() if k != "metrics"} for stage in stages],
            SUMMARIZED_STAGE: numbers,
        }
        self._client.log_text(self._run.id, json.dumps(summary, indent=2) + "\n", "summary.json")
        if params:
            self._client.log_text(self._run.id, params, "params.yaml")
        if evaluation:
            last = _last(stages, SUMMARIZED_STAGE) or evaluation  # whose report shows both policies of a run with two
            self._copy_files(last.mlflow_run_id)
        try:
            self._describe(status, stages, facts, numbers, parse_settings(params))
        except Exception as error:  # the run must end
            warn(error, self._config)
        if self._run.plugin_run is None:  # else Kubeflow Pipelines ends the run that it started
            self._client.set_terminated(self._run.id, STATUS[status])

    def _describe(
        self,
        status: str,
        stages: Sequence[StageResult],
        facts: Mapping[str, str],
        numbers: Mapping[str, float],
        settings: Mapping[str, Any],
    ) -> None:
        """Log what answers without looking at the stages: settings, data sets, costs, tags, name and description."""
        run, nested = self._client.get_run(self._run.id), self._nested_runs()
        # The server accepts no other value for a param, such as of a setting that has been changed for a resumed run.
        log_params(
            self._client, self._run.id, {k: v for k, v in flatten(settings).items() if key_of(k) not in run.data.params}
        )
        self._copy_inputs(run, nested)
        seconds: dict[str, float] = {}
        for stage in stages:
            seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.seconds
        cost = cost_of(seconds, settings)
        self._log_values(cost.metrics(), run.info.start_time)
        copied = [found.data.tags for found in nested if found.data.tags[STAGE_TAG] == SUMMARIZED_STAGE]
        tables = copied[-1].get(LOGGED_TABLES_TAG, "") if copied else ""  # those whose files the parent has
        tags = {**tags_of(settings, nested, facts), LOGGED_TABLES_TAG: tables}
        set_tags(self._client, self._run.id, {**tags, NOTE_TAG: note_of(status, facts, numbers, cost)})
        name = name_of(settings, run.info.start_time)
        if name and self._run.plugin_run is None and run.info.run_name == facts.get("run_id"):
            self._client.update_run(self._run.id, name=name)
        self._price_version(facts.get("run_id", ""), cost)

    def _copy_inputs(self, run: Any, nested: Sequence[Any]) -> None:
        """Log the data sets of all stages, each once."""

        def key(found: Any) -> tuple[str, str]:
            return found.dataset.name, found.dataset.digest

        known = {key(found) for found in run.inputs.dataset_inputs}
        inputs = {key(found): found for stage in nested for found in stage.inputs.dataset_inputs}
        new = [found for name, found in inputs.items() if name not in known]
        if new:
            self._client.log_inputs(self._run.id, new)

    def _price_version(self, run_id: str, cost: Cost) -> None:
        """Add the cost of the run to the version that it has registered."""
        name = self._config.registered_model
        version = find_version(self._client, name, run_id) if run_id else None
        if version is None:
            return
        tags = {"hours": f"{cost.hours:.3f}"} | ({} if cost.price is None else {"price": f"{cost.price:.2f}"})
        for tag, value in tags.items():
            self._client.set_model_version_tag(name, version.version, tag, value)
        text = (version.description or "").partition(COST_LINE)[0].rstrip()
        self._client.update_model_version(name, version.version, f"{text}\n\n{COST_LINE}{cost}.")

    def cancel(self) -> None:
        """End the parent run of an interrupted run. Errors are warnings."""
        try:
            self._client.set_terminated(self._run.id, STATUS["canceled"])
        except Exception as error:  # MLflow must not fail a run
            warn(error, self._config)

    def _log_metrics(self, stages: Sequence[StageResult], evaluation: StageResult | None) -> None:
        values = {
            name if evaluation and stage.name == evaluation.name else f"{stage.name}/{name}": value
            # The names of the deciding evaluation have no prefix, and win: it has the checks of its policy, as checks/NAME.
            for stage in sorted(stages, key=lambda each: evaluation is not None and each.name == evaluation.name)
            for name, value in stage.metrics.items()
        }
        # One time for all attempts of notify: MLflow ignores a point that it has.
        self._log_values(values, self._client.get_run(self._run.id).info.start_time)

    def _log_values(self, values: Mapping[str, float], milliseconds: int) -> None:
        from mlflow.entities import Metric

        points = [Metric(key_of(name), value, milliseconds, 0) for name, value in values.items()]
        for start in range(0, len(points), 1000):  # the server's limit for one request
            self._client.log_batch(self._run.id, metrics=points[start : start + 1000])

    def _copy_files(self, mlflow_run_id: str) -> None:
        with tempfile.TemporaryDirectory(prefix="rlhf-mlflow-") as folder:
            for file in self._client.list_artifacts(mlflow_run_id):
                if not file.is_dir:
                    path = self._client.download_artifacts(mlflow_run_id, file.path, folder)
                    self._client.log_artifact(self._run.id, path)

    def was_notified(self, status: str) -> bool:
        return str(self._client.get_run(self._run.id).data.tags.get(NOTIFIED_TAG)) == status

    def set_notified(self, status: str) -> None:
        """Remember that this status was announced, so that another attempt of notify does not announce it again."""
        self._client.set_tag(self._run.id, NOTIFIED_TAG, status)


def deciding_evaluation(stages: Sequence[StageResult]) -> StageResult | None:
    """The evaluation of the policy that goes to the gate; None without any."""
    last = _last(stages, SUMMARIZED_STAGE)
    if last is None or last.metrics.get(GOES_TO_GATE) == 0.0:
        return _last(stages, FIRST_EVALUATION) or last
    return last


def _last(stages: Sequence[StageResult], name: str) -> StageResult | None:
    """The last attempt of a stage."""
    return next((stage for stage in reversed(stages) if stage.name == name), None)


def open_parent(config: TrackingConfig, run_id: str) -> Parent | None:
    """The parent run with this run_id; None without tracking, or with a warning if MLflow cannot be reached."""
    if not config.enabled or not config.uri or not run_id:
        return None
    try:
        client = connect(config.uri)
        return Parent(client, config, find_parent_run(client, config, run_id))
    except Exception as error:  # MLflow must not fail a run
        warn(error, config)
        return None


def experiment_link(config: TrackingConfig, address: str) -> str:
    """Where people look at the runs of the experiment on the server at this address; the address itself if MLflow cannot be asked."""
    assert config.uri
    try:
        experiment = connect(config.uri).get_experiment_by_name(config.experiment)
    except Exception as error:  # the server is shown anyway
        warn(error, config)
        return address
    return link_to(address, str(experiment.experiment_id)) if experiment else address
