"""The model card of a policy: what it was trained on and how, what was measured, and what was not."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.params import Params
from components.rlhf.page.costs import cost_table
from components.rlhf.text.comparison_table import comparison_rows
from pipelines.local.report import stage_costs

SOURCES = ("demonstrations", "preferences", "prompts")


def model_card(
    params: Mapping[str, Any],
    summary: Mapping[str, Any],
    policy: Manifest,
    *,
    license_name: str = "",
    findings: Sequence[Mapping[str, str]] = (),
) -> str:
    """Markdown with the metadata block of the Hugging Face Hub. A run without an evaluation says so.

    license_name is that of the base model, as its source states it; findings are those of the evaluation of this policy.
    """
    from jinja2 import Environment

    source = str(params["model"]["source"])
    is_hub = "://" not in source and not source.startswith(("pypi:", "/", ".")) and source.count("/") == 1
    is_listed = (
        re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license_name.lower()) is not None
    )  # the form of the Hub's license ids
    metadata = {
        **({"license": license_name.lower()} if is_listed else {}),
        **({"base_model": source} if is_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "kfp-rlhf"],
    }
    numbers = summary.get("evaluation_all") or {}
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True)
    return environment.from_string(template).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        name=params["preset"],
        source=_without_folders(source),
        is_hub=is_hub,
        params=params,
        sources={name: _location(params["data"].get(name)) for name in SOURCES},
        rewards=", ".join(reward["kind"] for reward in params["ppo"]["rewards"]),
        judges=", ".join(judge["kind"] for judge in _as_list(params["judge"])),
        license_name=license_name,
        findings=findings,
        costs=_cost_lines(params, summary),
        numbers=numbers,
        rows=comparison_rows(numbers) if numbers else [],
        summary=summary,
        policy=policy,
        digest=policy.digest,
    )


def _cost_lines(params: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """The table of what the stages took, as lines of Markdown; [] if the run has not ended."""
    stages = summary.get("stages") or {}
    if not stages:
        return []
    head, rows = cost_table(stage_costs(stages, Params.model_validate(params)))
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _location(source: Any) -> str:
    """Where records come from; "" without a source."""
    if isinstance(source, list):
        return ", ".join(map(_location, source))
    return "" if source is None else _without_folders(str(source.get("path", "")))


def _without_folders(path: str) -> str:
    """The name of a local file, whose folders concern nobody else; a URI as it is."""
    return Path(path).name if path.startswith(("/", ".", "~")) else path


def _as_list(judge: Any) -> list[Any]:
    return judge if isinstance(judge, list) else [judge]
