"""A sweep on a cluster: one run of Kubeflow Pipelines for each point."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from components.rlhf.text.errors import InputError
from pipelines.cluster import submit
from pipelines.cluster.evaluation import metric_lines
from pipelines.cluster.server import ServerAccess
from pipelines.plan import refuse_what_cannot_fit
from pipelines.sweep import Point

Log = Callable[[str], None]


def submit_points(
    points: Sequence[Point], access: ServerAccess, options: submit.SubmitOptions, log: Log, *, one_by_one: bool
) -> int:
    """Submit every point as a run named after it. Returns 0, or 1 if a run has failed; that does not end the sweep.

    one_by_one waits for the end of each run, so that the next one finds its stages in the cache of Kubeflow Pipelines, which has only
    those that have finished. Raises InputError before the first run for what is invalid at any point.
    """
    for point in points:
        try:
            submit.check_params(point.params)
            refuse_what_cannot_fit(point.params)
        except InputError as error:
            raise InputError(f"point {point.name}: {error}") from None
    code = 0
    for number, point in enumerate(points):
        log(f"point    {point.name} ({number + 1} of {len(points)})")
        own = replace(options, name=f"{options.name} {point.name}")
        try:
            server, run_id = submit.submit(point.params, access, own, log)
            if one_by_one:
                own_code = submit.wait(server, access, run_id, own, log)
                for line in metric_lines(point.params, run_id) if own_code == 0 else ():
                    log(line)
                code = max(code, own_code)
        except InputError as error:
            raise InputError(f"point {point.name}, after {number} of {len(points)} points: {error}") from None
    return code
