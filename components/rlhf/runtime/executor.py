"""KFP's executor protocol: the executor input of a task, and the executor output that reports its artifacts.

KFP passes the executor input as JSON (`{{$}}`); it names the executor output file. The cluster parses the output strictly
(unknown fields and nulls fail the task), and kfp.local ignores artifacts that are missing in it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact
from components.rlhf.text.strict_json import NotJsonError, parse_json

Points = list[Mapping[str, float]]  # of a curve
Metadata = Mapping[str, str | int | float | Points]
# In the metadata of a manifest: where the model is, and the S3 server of the published one if it is not AWS.
MODEL_URI, PUBLISHED_URI, PUBLISHED_ENDPOINT = "model_uri", "published_uri", "published_endpoint"


def write_executor_output(executor_input: str, metadata: Mapping[str, Metadata]) -> None:
    """Write the executor output file atomically, with all declared output artifacts and their metadata.

    Every artifact keeps the URI that KFP gave it: KFP's launcher fails a task that reports a URI outside of the pipeline root
    (backend/src/v2/component/launcher_v2.go of Kubeflow Pipelines 2.17, uploadOutputArtifacts).
    """
    outputs = _section(executor_input, "outputs")
    output_file = Path(_string(outputs, "outputFile"))
    declared = outputs.get("artifacts", {})
    if not isinstance(declared, dict):
        raise _invalid_executor_input("outputs.artifacts is not an object")
    unknown = set(metadata) - set(declared)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is not a declared output artifact")
    artifacts = {}
    for name in declared:
        artifact = _artifact(outputs, name)
        entry = {
            "name": _string(artifact, "name"),
            "uri": _string(artifact, "uri"),
            "metadata": _validate_metadata(name, metadata.get(name, {})),
        }
        artifacts[name] = {"artifacts": [entry]}
    output_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_file.with_name(output_file.name + ".writing")
    temporary.write_text(json.dumps({"artifacts": artifacts}, allow_nan=False), encoding="utf-8")
    temporary.replace(output_file)


def output_uri(executor_input: str, name: str) -> str:
    """KFP's URI of an output artifact: s3:// or minio:// on a cluster, a path in a local run."""
    return _string(_artifact(_section(executor_input, "outputs"), name), "uri")


def input_uri(executor_input: str, name: str) -> str:
    """KFP's URI of an input artifact; "" if there is none."""
    try:
        return _string(_artifact(_section(executor_input, "inputs"), name), "uri")
    except InputError:
        return ""


def input_metadata(executor_input: str, name: str, key: str) -> str:
    """A string in the metadata of an input artifact; "" if there is none."""
    metadata = _artifact(_section(executor_input, "inputs"), name).get("metadata")
    value = metadata.get(key) if isinstance(metadata, dict) else None
    return value if isinstance(value, str) and value.isprintable() else ""


def write_parameter(path: Path | None, value: str) -> None:
    """Write an output parameter to the file that KFP passes, and create its folder (kfp.local does not). None does nothing."""
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
        raise _invalid_executor_input(f"{name} is missing")
    return section


def _artifact(section: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        artifact = section["artifacts"][name]["artifacts"][0]
    except (KeyError, TypeError, IndexError):
        artifact = None
    if not isinstance(artifact, dict):
        raise _invalid_executor_input(f"the artifact {name[:80]!a} is missing")
    return artifact


def _string(section: dict[str, Any], name: str) -> str:
    value = section.get(name)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _invalid_executor_input(f"{name} is missing or invalid")
    return value


def _invalid_executor_input(reason: str) -> InputError:
    return InputError(f"--executor-input is not KFP's executor input ({reason}); omit it when running manually.")


def _validate_metadata(name: str, metadata: Metadata) -> dict[str, str | int | float | Points]:
    for key, value in metadata.items():
        if isinstance(value, list) and all(isinstance(point, Mapping) for point in value):
            for point in value:  # KFP's launcher keeps a list, and its UI draws that of a ClassificationMetrics
                _validate_metadata(f"{name}, {key}", point)
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"metadata {key} of {name} is {value!r}; KFP accepts only strings and numbers")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metadata {key} of {name} is {value}; KFP accepts only finite numbers")
    return {key: redact(value) if isinstance(value, str) else value for key, value in metadata.items()}
