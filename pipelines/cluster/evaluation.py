"""What the evaluation of a run on a cluster has measured, as MLflow has it."""

from collections.abc import Iterator

from components.rlhf.config.params import Params
from components.rlhf.tracking.mlflow import warn, with_environment_uri
from components.rlhf.tracking.parent import SUMMARIZED_STAGE, open_parent

METRICS = ("win_rate", "win_rate_low", "win_rate_high", "kl")


def metric_lines(params: Params, run_id: str) -> Iterator[str]:
    """Lines NAME=VALUE, which Katib's collector reads; none if the run has no evaluation, or MLflow cannot be reached from here."""
    parent = open_parent(with_environment_uri(params.tracking), run_id)
    try:
        stages = parent.stages() if parent else []
    except Exception as error:  # MLflow must not fail a command
        warn(error)
        return
    for stage in stages:
        if stage.name == SUMMARIZED_STAGE and stage.status == "FINISHED":
            yield from (f"{name}={stage.metrics[name]:.6g}" for name in METRICS if name in stage.metrics)
