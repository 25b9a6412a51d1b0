"""Files that the settings of judges name: rubrics, and modules with functions. Their text travels in the settings."""

import re
from importlib.util import find_spec
from pathlib import Path

from pydantic import ValidationError

from components.rlhf.config.judge import MAX_JUDGES_BYTES, EndpointJudge, FunctionJudge, as_list
from components.rlhf.config.params import Params, explain_validation_error
from components.rlhf.text.errors import InputError

# Line breaks other than \n, and characters that some programs take for one.
LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def read_judge_files(params: Params, folder: Path) -> Params:
    """The params with the text of rubric files and the source of functions, which the stages cannot read elsewhere.

    Relative paths are those of folder or of the working directory. Raises InputError.
    """
    judges = []
    for number, judge in enumerate(as_list(params.judge)):
        key = f"judge.{number}" if isinstance(params.judge, tuple) else "judge"
        content = judge.model_dump(mode="json")
        if isinstance(judge, EndpointJudge) and judge.rubric_file:
            content |= {"rubric": _read_text(f"{key}.rubric_file", judge.rubric_file, folder), "rubric_file": None}
        if isinstance(judge, FunctionJudge) and not judge.source:
            module = judge.function.partition(":")[0]
            file = f"{module.replace('.', '/')}.py"
            if any((parent / file).is_file() for parent in (folder, Path())):
                content["source"] = _read_text(f"{key}.function", file, folder)
            elif not _is_installed(module.partition(".")[0]):
                raise InputError(
                    f"{key}.function: there is neither {file} next to the params file or in the working directory, nor an installed "
                    f"package {module.partition('.')[0]}; correct the name."
                )
        judges.append(content)
    content = params.model_dump(mode="json") | {"judge": judges if isinstance(params.judge, tuple) else judges[0]}
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise InputError(explain_validation_error(error, Params)) from None


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _read_text(key: str, name: str, folder: Path) -> str:
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
