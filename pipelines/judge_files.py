"""Files that judges, rewards and the environment name: rubrics, schemas, and modules. Their text travels in the settings."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.judge import MAX_JUDGES_BYTES
from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.code_files import code_folder

# Line breaks other than \n, and characters that some programs take for one.
LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
FILES = {"rubric_file": "rubric", "schema_file": "schema_text"}  # a setting with a file, and the one with its text


def read_judge_files(params: Params, folder: Path) -> Params:
    """The params with the text of rubrics and schemas and the source of functions, which the stages cannot read elsewhere.

    Relative paths are those of folder or of the working directory. A module in the folder of code needs no source. Raises InputError.
    """
    code = code_folder(params, folder)
    is_elsewhere = params.code.is_given and code is None
    found = {
        key: _with_texts(key, section.model_dump(mode="json"), folder, code=code, is_elsewhere=is_elsewhere)
        for key, section in params.keyed_rewards_and_judges().items()
    }
    judges = [section for key, section in found.items() if key.startswith("judge")]
    rewards = [section for key, section in found.items() if key.startswith("ppo.rewards.")]
    content = params.model_dump(mode="json")
    content["judge"] = judges if isinstance(params.judge, tuple) else judges[0]
    if rewards:  # a run without PPO has none
        content["ppo"]["rewards"] = rewards
    content["ppo"]["environment"] = found.get("ppo.environment")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise InputError(explain_validation_error(error, Params)) from None


def _with_texts(
    key: str, section: dict[str, Any], folder: Path, *, code: Path | None, is_elsewhere: bool
) -> dict[str, Any]:
    """The settings of one judge, reward or environment, with texts instead of the names of files."""
    for setting, text in FILES.items():
        if section.get(setting):
            section |= {text: read_text(f"{key}.{setting}", section[setting], folder), setting: None}
    if section["kind"] == "function" and not section["source"]:
        module = section["function"].partition(":")[0]
        file, package = f"{module.replace('.', '/')}.py", module.partition(".")[0]
        if code and ((code / file).is_file() or (code / package / "__init__.py").is_file()):
            return section
        if any((parent / file).is_file() for parent in (folder, Path())):
            section["source"] = read_text(f"{key}.function", file, folder)
        elif not is_elsewhere and not _is_installed(package):
            raise InputError(
                f"{key}.function: there is neither {file} next to the params file or in the working directory, nor an installed "
                f"package {package}; correct the name."
            )
    return section


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def read_text(key: str, name: str, folder: Path) -> str:
    """The text of a file that is relative to the working directory or to folder."""
    try:
        path = next((p for p in (folder / Path(name).expanduser(), Path(name)) if p.is_file()), None)
    except (OSError, RuntimeError):  # a name that is too long, a home directory of nobody
        path = None
    if path is None:
        raise InputError(
            f"{key}: {name[:200]} is not a file next to the params file or in the working directory; correct the path."
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JUDGES_BYTES + 1)
        if len(data) <= MAX_JUDGES_BYTES and data.strip():
            return LINE_BREAK.sub("\n", data.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: {path} cannot be read as UTF-8 text ({error}).") from None
    raise InputError(f"{key}: {path} must have 1 to {MAX_JUDGES_BYTES:,} bytes of text.")
