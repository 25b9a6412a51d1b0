"""KFP's executor protocol: what a container is told of its task, and what it reports back.

KFP passes the executor input as JSON text (`{{$}}`). The executor output file, named in it, carries artifact metadata; the
cluster parses it strictly (an unknown field or a null fails the task), and kfp.local knows no artifact that is not in it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact
from components.rlhf.text.strict_json import NotJsonError, parse_json

Flat = Mapping[str, str | int | float]


def write_executor_output(
    executor_input: str, metadata: Mapping[str, Flat], uris: Mapping[str, str] | None = None
) -> None:
    """Report every declared output artifact, each with its metadata (flat strings and finite numbers), atomically.

    uris names artifacts that lie elsewhere than where KFP would put them; KFP then copies nothing there.
    """
    outputs = _section(executor_input, "outputs")
    output_file = Path(_text(outputs, "outputFile"))
    declared = outputs.get("artifacts", {})
    if not isinstance(declared, dict):
        raise _invalid_executor_input("outputs.artifacts is no object")
    unknown = set(metadata) - set(declared)
    if unknown:
        raise ValueError(f"no output artifact is called {', '.join(sorted(unknown))}")
    artifacts = {}
    for name in declared:
        artifact = _artifact(outputs, name)
        artifacts[name] = {
            "artifacts": [
                {
                    "name": _text(artifact, "name"),
                    "uri": (uris or {}).get(name, _text(artifact, "uri")),
                    "metadata": _checked(name, metadata.get(name, {})),
                }
            ]
        }
    output_file.parent.mkdir(parents=True, exist_ok=True)
    draft = output_file.with_name(output_file.name + ".writing")
    draft.write_text(json.dumps({"artifacts": artifacts}, allow_nan=False), encoding="utf-8")
    draft.replace(output_file)


def input_uri(executor_input: str, name: str) -> str:
    """Where KFP keeps an input artifact (s3://, minio:// or a path on this machine): the address that outlives the pod."""
    return _text(_artifact(_section(executor_input, "inputs"), name), "uri")


def output_uri(executor_input: str, name: str) -> str:
    """Where KFP means to keep an output artifact: a URI on a cluster, a path on a laptop."""
    return _text(_artifact(_section(executor_input, "outputs"), name), "uri")


def write_parameter(path: Path | None, value: str) -> None:
    """Write an output parameter to the file that KFP names; its folder does not exist on a laptop. None: run by hand."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(redact(value), encoding="utf-8")


def _section(executor_input: str, name: str) -> dict[str, Any]:
    try:
        content = parse_json(executor_input)
    except NotJsonError as error:
        raise _invalid_executor_input(str(error)) from None
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise _invalid_executor_input(f"no {name} in it")
    return section


def _artifact(section: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        artifact = section["artifacts"][name]["artifacts"][0]
    except (KeyError, TypeError, IndexError):
        artifact = None
    if not isinstance(artifact, dict):
        raise _invalid_executor_input(f"no artifact {name[:80]!a} in it")
    return artifact


def _text(holder: dict[str, Any], name: str) -> str:
    value = holder.get(name)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _invalid_executor_input(f"no {name} in it")
    return value


def _invalid_executor_input(reason: str) -> InputError:
    return InputError(f"--executor-input is not KFP's executor input ({reason}); leave it out when running by hand.")


def _checked(name: str, metadata: Flat) -> dict[str, str | int | float]:
    for key, value in metadata.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"metadata {key} of {name} is {value!r}; KFP takes flat strings and numbers only")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metadata {key} of {name} is {value}; KFP takes finite numbers only")
    return {key: redact(value) if isinstance(value, str) else value for key, value in metadata.items()}
