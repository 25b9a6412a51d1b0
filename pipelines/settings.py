"""Params files: YAML with presets and command-line overrides, validated before anything runs."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.checks import ChecksStageConfig
from components.rlhf.config.code import ImportCodeStageConfig
from components.rlhf.config.dpo import DpoStageConfig
from components.rlhf.config.environment import with_observations
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.explain import explain_validation_error, short_repr
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.policy import Method
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig, PreviewConfig
from components.rlhf.config.register import ApprovalConfig, RegisterStageConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.sft import SftStageConfig
from components.rlhf.config.storage import SETTINGS_VARIABLE
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import find_secrets
from components.rlhf.text.strict_yaml import MAX_BYTES, NotYamlError, parse_yaml
from pipelines.check_files import read_check_files
from pipelines.code_files import code_folder, read_code
from pipelines.judge_files import read_judge_files
from pipelines.profiles import resolve_profiles

MAX_SETTINGS_BYTES = 16 * 1024  # of an environment variable that every task has


def load_params(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Load a params file and apply SECTION.KEY=VALUE overrides. Raises InputError with one sentence per mistake.

    A file may contain `presets`: named sections that are merged over the rest of the file. `preset` chooses one, in the file or by
    an override; overrides of other keys are applied after it.
    """
    content = _read_yaml(path)
    preset_overrides = [override for override in overrides if override.partition("=")[0].strip() == "preset"]
    for override in preset_overrides:
        _apply_override(content, override)
    content = _apply_preset(content, path)
    for override in overrides:
        if override not in preset_overrides:
            _apply_override(content, override)
    content = resolve_profiles(content)
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain_validation_error(error, Params)}") from None
    params = read_check_files(read_judge_files(params, path.parent), path.parent)
    params = read_code(params, code_folder(params, path.parent))
    _reject_secrets(params, path)
    return params


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(
                f"{path} is longer than {MAX_BYTES // 2**20} MiB, too long for a params file; correct the path."
            )
        content = parse_yaml(data.decode("utf-8"))
    except FileNotFoundError:
        available = ", ".join(map(str, sorted(Path(__file__).parent.glob("params/*.yaml"))))
        raise InputError(f"{path} does not exist; available params files: {available}.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it as UTF-8.") from None
    except NotYamlError as error:
        location = f"{path}:{error.line}" if error.line else str(path)
        raise InputError(f"{location} is not YAML ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} contains a {type(content).__name__}; a params file must be a mapping of sections.")
    return content


def _reject_secrets(params: Params, path: Path) -> None:
    """Raise InputError for a parameter that contains a secret of the environment: it would be copied into pipelines and reports."""
    values = list(_leaves(params.model_dump(mode="json")))
    for name, secret in find_secrets(os.environ).items():
        for key, value in values:
            if secret in value:
                raise InputError(
                    f"{path}: {key} contains the secret in the environment variable {name}, and would be copied into pipelines and "
                    "reports; remove it, or rename the variable if it is not a secret."
                )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of nested settings, with the numbers of lists as keys; keys of mappings are values too."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield key, str(name)
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)


def _apply_preset(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content with the chosen preset merged over it. In a file without presets, `preset` is only a label."""
    presets = content.pop("presets", None)
    if presets is None:
        return content
    if not isinstance(presets, dict) or not all(isinstance(sections, dict) for sections in presets.values()):
        raise InputError(f"{path}: presets must map each name to the sections that it changes.")
    name = content.get("preset")
    if not isinstance(name, str) or name not in presets:
        raise InputError(
            f"{path} has no preset {short_repr(name)}; available presets: {', '.join(map(str, presets)) or 'none'}."
        )
    merged = _merge(content, presets[name])
    assert isinstance(merged, dict)
    return merged


def _merge(base: Any, override: Any) -> Any:
    """Merge override into base: mappings key by key, anything else is replaced."""
    if not isinstance(base, dict) or not isinstance(override, dict):
        return override
    return base | {key: _merge(base.get(key), value) for key, value in override.items()}


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Set KEY.KEY=VALUE in the nested content; VALUE is parsed as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {short_repr(override)} is not of the form SECTION.KEY=VALUE.")
    *sections, name = key.strip().split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {short_repr(override)}: {section} is not a section.")
        # Sections that share a YAML anchor are one object, of which the override must change only one.
        content[section] = dict(inner)
        content = content[section]
    try:
        content[name] = _parse_value(text)
    except NotYamlError as error:
        raise InputError(f"--set {short_repr(override)}: the value is not YAML ({error}).") from None


def _parse_value(text: str) -> Any:
    """Parse YAML, but 1e-5 as a number, which YAML 1.1 parses as a string. Quotes keep it a string."""
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text.strip()):
        return float(text)
    return parse_yaml(text)


def dump_yaml(params: Params) -> str:
    """The resolved parameters as a params file that reproduces the run."""
    return yaml.safe_dump(json.loads(params.canonical_json()), sort_keys=False, allow_unicode=True)


def own_settings(params: Params) -> str:
    """The settings that are not defaults, as JSON that Params reads."""
    own = params.model_dump(mode="json", exclude_defaults=True)
    # Settings of a method that does not run are only allowed beside a policy.method that is given.
    return json.dumps({**own, "policy": params.policy.model_dump(mode="json")}, ensure_ascii=False)


def settings_variable(params: Params) -> dict[str, str]:
    """The environment variable with own_settings() that every task has for MLflow; {} for long ones, such as those with files.

    A variable has at most 128 KiB on Linux, and the compiled pipeline has a copy for each task. notify logs all settings in any case.
    """
    text = own_settings(params)
    return {SETTINGS_VARIABLE: text} if len(text.encode()) <= MAX_SETTINGS_BYTES else {}


def settings_of_stage(params: Params, stage: str) -> str:
    """The canonical JSON that the pipeline passes to one stage."""
    stages: dict[str, type[BaseConfig]] = {
        "prepare_data": PrepareDataStageConfig,
        "sft": SftStageConfig,
        "reward_model": RewardModelStageConfig,
        "judge": JudgeStageConfig,
        "ppo": PpoStageConfig,
        "dpo": DpoStageConfig,
        "checks": ChecksStageConfig,
        "evaluation": EvaluationStageConfig,
        "import_code": ImportCodeStageConfig,
    }
    if stage == "import_model":
        return import_settings(params, "base_model", params.model.source, params.model.revision)
    if stage not in stages:
        raise InputError(f"{stage} is not a stage with settings; stages: {', '.join(['import_model', *stages])}.")
    return params.stage(stages[stage]).canonical_json()


def evaluation_settings(params: Params, method: Method) -> str:
    """The canonical JSON of the task that evaluates the policy of a method."""
    stage = params.stage(EvaluationStageConfig)
    is_last = method == params.policy.methods[-1]
    update = {"method": method, "stage_name": "evaluation" if is_last else f"{method}_evaluation"}
    return stage.model_copy(update=update).canonical_json()


def register_settings(params: Params, decision: str) -> str:
    """The canonical JSON of register on a branch of the gate. Only a policy that would be promoted waits for a person."""
    approval = None
    if decision == "promote" and params.gate.approval == "required":
        hours, url = params.gate.approval_hours, params.cluster.ui_url
        approval = ApprovalConfig(hours=hours, preset=params.preset, ui_url=url)
    return RegisterStageConfig.model_validate({"decision": decision, "approval": approval}).canonical_json()


def checks_settings(params: Params, method: Method) -> str:
    """The canonical JSON of the task that checks the policy of a method."""
    is_last = method == params.policy.methods[-1]
    update = {"method": method, "stage_name": "checks" if is_last else f"{method}_checks"}
    return params.stage(ChecksStageConfig).model_copy(update=update).canonical_json()


def judge_reward_model_settings(params: Params) -> str:
    """The canonical JSON of the task that trains or imports the judge's reward model: that of reward_model with another seed.

    Its scores need no scale, because the judge only compares them.
    """
    judge = params.reward_model_judge
    assert judge is not None
    section = params.reward_model.model_copy(update={"use": judge.use, "num_calibration_samples": 0})
    own = params.model_copy(update={"reward_model": section, "seed": (params.seed + 1) % 2**31})
    stage = own.stage(RewardModelStageConfig).model_copy(update={"stage_name": "judge_reward_model"})
    return stage.canonical_json()


def preview_settings(params: Params) -> str:
    """The canonical JSON that `kfp-rlhf data` passes to the program that shows the data."""
    stage = params.stage(PrepareDataStageConfig)
    return PreviewConfig(model=params.model, prepare_data=stage, storage=params.storage).canonical_json()


def import_settings(
    params: Params, kind: Literal["base_model", "sft_model", "reward_model"], source: str, revision: str | None = None
) -> str:
    """The canonical JSON of one import: the source, and what the run needs of the model."""
    environment = params.ppo.environment
    samplings = [
        with_observations(each, environment) for each in (params.ppo.rollout.sampling, params.evaluation_sampling)
    ]
    longest_response = max(sampling.max_new_tokens for sampling in samplings)
    is_language_model = kind != "reward_model"
    return ImportModelStageConfig(
        kind=kind,
        source=source,
        revision=revision,
        num_frozen_layers=params.model.num_frozen_layers if is_language_model else 0,
        lora_modules=params.model.lora.target_modules if params.model.lora and is_language_model else (),
        quantization=params.model.lora.quantization if params.model.lora and is_language_model else None,
        max_sequence_tokens=max(params.data.max_tokens, params.data.max_prompt_tokens + longest_response),
        precision=params.model.precision,
        is_chat=params.data.template == "chat" and is_language_model,
    ).canonical_json()
