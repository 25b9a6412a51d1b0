"""Files that the checks of the gate name: prompts and rubrics. Their text travels in the settings."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json
from pipelines.code_files import code_folder
from pipelines.judge_files import read_text


def read_check_files(params: Params, folder: Path) -> Params:
    """The params with the prompts and rubrics of checks in place of the names of their files, which are relative to folder.

    Raises InputError.
    """
    if not params.gate.checks:
        return params
    content = params.model_dump(mode="json")
    for number, check in enumerate(content["gate"]["checks"]):
        _read_into(check, f"gate.checks.{number}", folder)
        if check.get("include_path"):
            _require_tasks(check["include_path"], f"gate.checks.{number}.include_path", code_folder(params, folder))
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise InputError(explain_validation_error(error, Params)) from None


def _read_into(check: dict[str, Any], key: str, folder: Path) -> None:
    if check.get("prompts_file"):
        name = check["prompts_file"]
        text = read_text(f"{key}.prompts_file", name, folder)
        check |= {"prompts": prompts_in(text, name, f"{key}.prompts_file"), "prompts_file": None}
    endpoint = check.get("endpoint")
    if endpoint and endpoint["rubric_file"]:
        rubric = read_text(f"{key}.endpoint.rubric_file", endpoint["rubric_file"], folder)
        endpoint |= {"rubric": rubric, "rubric_file": None}


def _require_tasks(name: str, key: str, code: Path | None) -> None:
    """Raise InputError unless include_path is a folder in code.path, where that is on this machine."""
    if code is None:
        return
    path = (code / name).resolve()
    if not path.is_dir() or not path.is_relative_to(code.resolve()):
        raise InputError(f"{key}: {name} is not a folder in code.path ({code}); correct it.")


def prompts_in(text: str, name: str, key: str) -> list[str]:
    """The prompts of a file: of JSONL the field prompt of each line, else the lines that are not empty. Raises InputError."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if Path(name).suffix not in (".jsonl", ".json"):
        return [line.strip() for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            row = parse_json(line)
        except NotJsonError as error:
            raise InputError(f"{key}: {name}:{number} is not JSON ({error}).") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(
                f"{key}: {name}:{number} has no text in the field prompt; write lines like {json.dumps({'prompt': '...'})}."
            )
        prompts.append(prompt)
    return prompts
