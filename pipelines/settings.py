"""Params files: YAML on disk, settings of the command line on top, validated before anything runs."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.config.params import Params, explain_validation_error, short_repr
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.sft import SftStageConfig
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import find_secrets
from components.rlhf.text.strict_yaml import MAX_BYTES, NotYamlError, parse_yaml
from components.rlhf.tracking.mlflow import flatten
from pipelines.profiles import resolve_profiles


def load_params(path: Path, overrides: Sequence[str] = ()) -> Params:
    """The params of a file with SECTION.KEY=VALUE overrides. Raises InputError with one sentence per mistake.

    A file may hold `presets`: sections by name that are laid over the file's own. `preset` names the one that is used, in the
    file or by an override; overrides of other keys come after it.
    """
    content = _read_yaml(path)
    chosen = [override for override in overrides if override.partition("=")[0].strip() == "preset"]
    for override in chosen:
        _apply(content, override)
    content = _apply_preset(content, path)
    for override in overrides:
        if override not in chosen:
            _apply(content, override)
    content = resolve_profiles(content)
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain_validation_error(error, Params)}") from None
    _refuse_secrets(params, path)
    return params


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(
                f"{path} is longer than {MAX_BYTES // 2**20} MiB, which no params file is; correct the path."
            )
        content = parse_yaml(data.decode("utf-8"))
    except FileNotFoundError:
        near = sorted(Path(__file__).parent.glob("params/*.yaml"))
        raise InputError(
            f"{path} does not exist; params files that come with this: {', '.join(map(str, near))}."
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it as UTF-8.") from None
    except NotYamlError as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        raise InputError(f"{where} is not YAML ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; a params file is a mapping of sections.")
    return content


def _refuse_secrets(params: Params, path: Path) -> None:
    """Raise InputError for a parameter with a secret of this environment in it: it would stand in pipelines, reports and MLflow."""
    values = {key: str(value) for key, value in flatten(params.model_dump(mode="json")).items()}
    for name, secret in find_secrets(os.environ).items():
        for key, value in values.items():
            if secret in value:
                raise InputError(
                    f"{path}: {key} holds what the environment variable {name} holds, a secret, and would be copied into pipelines "
                    "and reports; take it out, or rename the variable if it is none."
                )


def _apply_preset(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content with its chosen preset over it. Without presets in the file, `preset` is no more than a name."""
    presets = content.pop("presets", None)
    if presets is None:
        return content
    if not isinstance(presets, dict) or not all(isinstance(sections, dict) for sections in presets.values()):
        raise InputError(f"{path}: presets must map each name to the sections that it changes.")
    name = content.get("preset")
    if not isinstance(name, str) or name not in presets:
        raise InputError(
            f"{path} has no preset {short_repr(name)}; presets there: {', '.join(map(str, presets)) or 'none'}."
        )
    merged = _merge(content, presets[name])
    assert isinstance(merged, dict)
    return merged


def _merge(under: Any, over: Any) -> Any:
    """over laid on under: mappings key by key, anything else replaced."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return under | {key: _merge(under.get(key), value) for key, value in over.items()}


def _apply(content: dict[str, Any], override: str) -> None:
    """Put KEY.KEY=VALUE into the nested content; VALUE is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {short_repr(override)} is not of the form SECTION.KEY=VALUE.")
    *sections, name = key.strip().split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {short_repr(override)}: {section} is not a section.")
        # YAML anchors make two sections one object; an override of one must not reach the other.
        content[section] = dict(inner)
        content = content[section]
    try:
        content[name] = _value(text)
    except NotYamlError as error:
        raise InputError(f"--set {short_repr(override)}: the value is not YAML ({error}).") from None


def _value(text: str) -> Any:
    """YAML, but 1e-5 is the number that people mean, which YAML 1.1 reads as text. Quotes keep text that looks like a number."""
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text.strip()):
        return float(text)
    return parse_yaml(text)


def dump_yaml(params: Params) -> str:
    """The resolved parameters, as a file that runs the same again."""
    return yaml.safe_dump(json.loads(params.canonical_json()), sort_keys=False, allow_unicode=True)


def settings_of_stage(params: Params, stage: str) -> str:
    """The canonical JSON that the pipeline hands to one stage."""
    stages: dict[str, type[BaseConfig]] = {
        "prepare_data": PrepareDataStageConfig,
        "sft": SftStageConfig,
        "reward_model": RewardModelStageConfig,
        "judge": JudgeStageConfig,
        "ppo": PpoStageConfig,
        "evaluation": EvaluationStageConfig,
    }
    if stage == "import_model":
        return ImportModelStageConfig(
            kind="base_model", source=params.model.source, revision=params.model.revision
        ).canonical_json()
    if stage not in stages:
        raise InputError(f"{stage} is not a stage with settings; stages: {', '.join(['import_model', *stages])}.")
    return params.stage(stages[stage]).canonical_json()
