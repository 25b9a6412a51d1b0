"""What the parent run of a pipeline run says at its end: its name, its description, its costs and its data sets."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from components.rlhf.config.cluster import ClusterConfig
from components.rlhf.config.policy import TITLES
from components.rlhf.text.comparison_table import comparison_rows, method_of
from components.rlhf.text.progress import format_duration
from components.rlhf.text.strict_yaml import NotYamlError, parse_yaml

COPIED_TAGS = (
    "mlflow.source.git.commit",
    "mlflow.source.git.dirty",
    "rlhf.code_revision",
    "rlhf.packages",
    "rlhf.python",
    "rlhf.cpu",
)


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds by stage, and the price of all, or None if the price of a stage is unknown."""

    seconds: Mapping[str, float]
    price: float | None

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    def __str__(self) -> str:
        price = "" if self.price is None else f", price {self.price:.2f}"
        return f"{format_duration(self.hours * 3600)} in {len(self.seconds)} stages{price}"

    def metrics(self) -> dict[str, float]:
        """Hours by stage and together, and the price."""
        found = {f"cost/hours/{stage}": seconds / 3600 for stage, seconds in self.seconds.items()}
        return found | {"cost/hours": self.hours} | ({} if self.price is None else {"cost/price": self.price})


def parse_settings(params: str) -> Mapping[str, Any]:
    """The settings in a params file; {} for anything else."""
    try:
        settings = parse_yaml(params) if params else {}
    except NotYamlError:
        settings = {}
    return settings if isinstance(settings, Mapping) else {}


def cost_of(seconds: Mapping[str, float], settings: Mapping[str, Any]) -> Cost:
    """The cost of stages that took so long. A stage is priced by its profile, on all its nodes."""
    try:
        cluster = ClusterConfig.model_validate(settings.get("cluster") or {})
    except ValueError:
        return Cost(seconds, None)
    profiles = [(cluster.profile(stage), taken) for stage, taken in seconds.items()]
    prices = [
        None if profile.price_per_hour is None else profile.price_per_hour * profile.num_nodes * taken / 3600
        for profile, taken in profiles
    ]
    known = [price for price in prices if price is not None]
    return Cost(seconds, sum(known) if len(known) == len(prices) else None)


def name_of(settings: Mapping[str, Any], start_milliseconds: int) -> str:
    """PRESET, seed and start of a run; "" without settings."""
    if not settings:
        return ""
    start = datetime.fromtimestamp(start_milliseconds / 1000, UTC)
    return f"{settings.get('preset', 'custom')}, seed {settings.get('seed', 0)}, {start:%Y-%m-%d %H:%M}"


def tags_of(settings: Mapping[str, Any], stages: Sequence[Any], facts: Mapping[str, str]) -> dict[str, str]:
    """Tags of the parent run. stages are the nested runs, whose code, packages and machines it repeats."""
    tags = {f"rlhf.{name}": str(settings[name]) for name in ("preset", "seed") if name in settings}
    tags |= {f"rlhf.{name}": value for name, value in facts.items() if name in ("decision", "reason")}
    for stage in stages:
        tags |= {name: stage.data.tags[name] for name in COPIED_TAGS if name in stage.data.tags}
    gpus = {stage.data.tags["rlhf.gpu"] for stage in stages if "rlhf.gpu" in stage.data.tags} - {"none"}
    tags["rlhf.gpu"] = "; ".join(sorted(gpus)) or "none"
    images = (settings.get("cluster") or {}).get("images") or {}
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        tags |= {f"rlhf.image.{role}": str(image) for role, image in images.items() if image}
    return tags


def note_of(status: str, facts: Mapping[str, str], numbers: Mapping[str, float], cost: Cost) -> str:
    """The description of the run in Markdown: verdict, comparison and cost. numbers are those of the evaluation."""
    verdict = {"promote": "Promoted", "reject": "Rejected"}.get(facts.get("decision", ""), status.capitalize())
    lines = [f"**{verdict}**" + (f": {facts['reason']}" if facts.get("reason") else "") + ".", ""]
    rows = comparison_rows(numbers) if "confidence" in numbers else []  # else it is not that of an evaluation
    if rows:
        lines += [
            f"| | SFT | {TITLES[method_of(numbers)]} |",
            "|---|---:|---:|",
            *(f"| {r['name']} | {r['sft']} | {r['policy']} |" for r in rows),
            "",
        ]
    lines += [f"It took {cost}: " + ", ".join(f"{s} {format_duration(t)}" for s, t in cost.seconds.items()) + "."]
    return "\n".join(lines) + "\n"
