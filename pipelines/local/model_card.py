"""The model card of a policy: what it was trained on and how, what was measured, and what was not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.text.comparison_table import comparison_rows

SOURCES = ("demonstrations", "preferences", "prompts")


def model_card(params: Mapping[str, Any], summary: Mapping[str, Any], policy: Manifest) -> str:
    """Markdown with the metadata block of the Hugging Face Hub. A run without an evaluation says so."""
    from jinja2 import Environment

    source = str(params["model"]["source"])
    is_hub = "://" not in source and not source.startswith(("pypi:", "/", ".")) and source.count("/") == 1
    metadata = {
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
        numbers=numbers,
        rows=comparison_rows(numbers) if numbers else [],
        summary=summary,
        policy=policy,
        digest=policy.digest,
    )


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
