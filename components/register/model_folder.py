"""The folder of a registered version: a model in MLflow's format that links to the weights instead of containing them.

Written without MLflow's own writer, which needs packages that the image of this stage lacks.
"""

import importlib.metadata
import json
import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.register import served_model
from components.register.source import Source
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.policy import TITLES
from components.rlhf.text.redaction import redact

DEFAULT_NEW_TOKENS = 128  # without an evaluation whose responses have a length
MAX_EXAMPLE_CHARS = 2000
PACKAGES = ("torch", "transformers", "boto3")
OLDEST = {
    "torch": "2.9",
    "transformers": "5.0",
    "boto3": "1.40",
}  # where another version is not installed: those of pyproject.toml
FALLBACK_EXAMPLE = "The movie is"


@dataclass(frozen=True)
class Link:
    """Where the weights are: a folder or an address that MLflow can download, and the digest of the manifest in it."""

    uri: str
    digest: str
    endpoint_url: str = ""  # of an S3 server other than AWS
    example: str = ""  # a prompt of the evaluation


def link_to(source: Source, model: Manifest, *, example: str) -> Link:
    return Link(source.uri, model.digest, source.endpoint_url, example)


def write_model_folder(folder: Path, link: Link, *, max_new_tokens: int) -> None:
    """Write MLmodel, the link, the code that loads it, requirements, and examples of a request.

    max_new_tokens is the default limit of a response.
    """
    python_version = platform.python_version()
    mlflow_version = _version("mlflow") or _version("mlflow-skinny")
    (folder / "code").mkdir(parents=True)
    shutil.copyfile(Path(served_model.__file__), folder / "code" / "served_model.py")
    _write(folder / served_model.LINK, {key: redact(value) for key, value in asdict(link).items()})
    requirements = [f"mlflow=={mlflow_version}", *(_requirement(name) for name in PACKAGES)]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    # JSON is YAML, which is what MLflow reads here.
    _write(folder / "python_env.yaml", {"python": python_version, "dependencies": ["-r requirements.txt"]})
    _write(
        folder / "conda.yaml",
        {
            "name": "mlflow-env",
            "channels": ["conda-forge"],
            "dependencies": [f"python={python_version}", "pip", {"pip": requirements}],
        },
    )
    inputs = {"inputs": [link.example or FALLBACK_EXAMPLE], "params": {"max_new_tokens": max_new_tokens}}
    _write(folder / "serving_input_example.json", inputs)
    _write(folder / "input_example.json", inputs)
    _write(folder / "MLmodel", _mlmodel(max_new_tokens, python_version, mlflow_version))


def _mlmodel(max_new_tokens: int, python_version: str, mlflow_version: str) -> dict[str, Any]:
    params: list[Mapping[str, Any]] = [
        {"name": "max_new_tokens", "type": "long", "default": max_new_tokens, "shape": None},
        {"name": "temperature", "type": "double", "default": 0.0, "shape": None},
    ]
    text = json.dumps([{"type": "string", "required": True}])
    return {
        "artifact_path": "model",
        "flavors": {
            "python_function": {
                "loader_module": "served_model",
                "code": "code",
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
                "python_version": python_version,
            }
        },
        "mlflow_version": mlflow_version,
        "model_uuid": uuid.uuid4().hex,
        "saved_input_example_info": {
            "artifact_path": "input_example.json",
            "params": "true",
            "serving_input_path": "serving_input_example.json",
            "type": "json_object",
        },
        "signature": {"inputs": text, "outputs": text, "params": json.dumps(params)},
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }


def _requirement(name: str) -> str:
    version = _version(name)
    return f"{name}=={version}" if version and "+" not in version else f"{name}>={OLDEST[name]}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def example_of(samples: Path) -> tuple[str, int]:
    """The shortest prompt of an evaluation and the length of its longest response to any, in tokens; "" and a default without samples."""
    prompt, length = "", 0
    if samples.is_file():
        with samples.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                text = str(row["prompt"])
                if len(text) <= MAX_EXAMPLE_CHARS and (not prompt or len(text) < len(prompt)):
                    prompt = text
                policy = next(row[name] for name in TITLES if name in row)
                length = max(length, int(policy["num_tokens"]))
    return prompt, length or DEFAULT_NEW_TOKENS
