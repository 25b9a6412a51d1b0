"""KFP's executor protocol: what a container is told of its task, and what it reports back.

KFP passes the executor input as JSON text (`{{$}}`). The executor output file, named in it, carries artifact metadata; the
cluster parses it strictly (an unknown field or a null fails the task), and kfp.local knows no artifact that is not in it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.rlhf.errors import InputError

Flat = Mapping[str, str | int | float]


def write_executor_output(
    executor_input: str, metadata: Mapping[str, Flat], uris: Mapping[str, str] | None = None
) -> None:
    """Report every declared output artifact, each with its metadata (flat strings and finite numbers), atomically.

    uris names artifacts that lie elsewhere than where KFP would put them; KFP then copies nothing there.
    """
    try:
        outputs: dict[str, Any] = json.loads(executor_input)["outputs"]
        output_file = Path(outputs["outputFile"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--executor-input is not KFP's executor input ({error}); leave it out when running by hand."
        ) from error
    declared: dict[str, Any] = outputs.get("artifacts", {})
    unknown = set(metadata) - set(declared)
    if unknown:
        raise ValueError(f"no output artifact is called {', '.join(sorted(unknown))}")
    artifacts = {}
    for name, entry in declared.items():
        artifact = entry["artifacts"][0]
        artifacts[name] = {
            "artifacts": [
                {
                    "name": artifact["name"],
                    "uri": (uris or {}).get(name, artifact["uri"]),
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
    uri: str = json.loads(executor_input)["inputs"]["artifacts"][name]["artifacts"][0]["uri"]
    return uri


def output_uri(executor_input: str, name: str) -> str:
    """Where KFP means to keep an output artifact: a URI on a cluster, a path on a laptop."""
    uri: str = json.loads(executor_input)["outputs"]["artifacts"][name]["artifacts"][0]["uri"]
    return uri


def write_parameter(path: Path | None, value: str) -> None:
    """Write an output parameter to the file that KFP names; its folder does not exist on a laptop. None: run by hand."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value, encoding="utf-8")


def _checked(name: str, metadata: Flat) -> dict[str, str | int | float]:
    for key, value in metadata.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"metadata {key} of {name} is {value!r}; KFP takes flat strings and numbers only")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metadata {key} of {name} is {value}; KFP takes finite numbers only")
    return dict(metadata)
