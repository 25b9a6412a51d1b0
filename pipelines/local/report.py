"""Completes the report of a finished run with what its evaluation could not know: the cost of all stages, and all parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.rlhf.config.params import Params
from components.rlhf.page.costs import StageCost, complete
from components.rlhf.text.redaction import redact

GIB = 2**30


def complete_report(page: Path, params: Params, stages: Mapping[str, Mapping[str, Any]], text: str) -> None:
    """Rewrite the report in place. stages are those of the summary, by name; text is the params file of the run."""
    done = complete(page.read_text(encoding="utf-8"), stage_costs(stages, params), redact(text))
    page.write_text(done, encoding="utf-8")


def stage_costs(stages: Mapping[str, Mapping[str, Any]], params: Params) -> list[StageCost]:
    return [_cost(name, stage, params) for name, stage in stages.items()]


def _cost(name: str, stage: Mapping[str, Any], params: Params) -> StageCost:
    """Time, memory and, if its profile has a price per hour, the price of a stage on one machine."""
    per_hour = params.cluster.profile(name.partition("-")[0]).price_per_hour
    memory, seconds = stage["memory"], stage["seconds"]
    peak = memory.get("peak_gib", stage["peak_memory_bytes"] / GIB)
    return StageCost(
        stage=name,
        seconds=seconds,
        peak_gib=peak or None,
        planned_gib=memory.get("planned_gib"),
        price=None if per_hour is None else per_hour * seconds / 3600,
    )
