"""Versions of a pipeline on the server: their names, upload, and differences."""

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kfp_server_api.exceptions import ApiException

from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.storage import SETTINGS_VARIABLE
from pipelines.cluster.server import Server, ServerAccess, translate_api_errors

IGNORED_KEYS = re.compile(
    r"\.(sdkVersion|resources\.(cpu|memory)(Limit|Request)|accelerator\.(count|type)|secretName|pvcMount\[\d+\]\.constant)$"
    r"|\.(inputDefinitions|inputs)\.parameters\.pipelinechannel--\w+$"  # values that the compiler passes between DAGs
    r"|notify\.inputs\.parameters\.settings\.runtimeValue\.constant\.params$"  # what differs is in the settings of the stages
)


def version_name(pipeline: str, package: Path) -> str:
    """PIPELINE-PACKAGE_VERSION-REVISION-DIGEST, a valid Kubernetes name that is the same for the same content."""
    revision = re.sub(r"[^a-z0-9]+", "-", code_revision().lower())
    short = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", revision)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()[:8]
    return f"{pipeline}-{importlib.metadata.version('kfp-rlhf')}-{short}-{digest}"


def find_pipeline(server: Server, access: ServerAccess, name: str) -> str | None:
    """The id of the pipeline with this name, or None."""
    with translate_api_errors(access):
        response = server.client.list_pipelines(
            filter=_name_filter(name), namespace=access.namespace if server.multi_user else None
        )
    return response.pipelines[0].pipeline_id if response.pipelines else None


def latest_version(server: Server, access: ServerAccess, pipeline_id: str, name: str | None = None) -> Any:
    """The latest version, or the one with this name; None if there is none."""
    query = {"filter": _name_filter(name)} if name else {"sort_by": "created_at desc"}
    with translate_api_errors(access):
        response = server.client.list_pipeline_versions(pipeline_id, page_size=1, **query)
    return response.pipeline_versions[0] if response.pipeline_versions else None


def _name_filter(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def upload(server: Server, access: ServerAccess, pipeline: str, package: Path) -> tuple[str, str]:
    """Upload the package as a version of the pipeline; return the ids of both.

    The pipeline is created if it does not exist, and a version with the same content is reused.
    """
    name = version_name(pipeline, package)
    description = f"kfp-rlhf {importlib.metadata.version('kfp-rlhf')}, revision {code_revision()}"
    pipeline_id = find_pipeline(server, access, pipeline)
    if pipeline_id is None:
        pipeline_id = _create(server, access, pipeline, description)
    version = latest_version(server, access, pipeline_id, name)
    if version is None:
        with translate_api_errors(access):
            version = server.client.upload_pipeline_version(
                str(package), name, pipeline_id=pipeline_id, description=description
            )
    return pipeline_id, version.pipeline_version_id


def _create(server: Server, access: ServerAccess, pipeline: str, description: str) -> str:
    """Create a pipeline without versions and return its id. Uploading one would also create a version, with another name."""
    from kfp_server_api import V2beta1Pipeline

    request = V2beta1Pipeline(
        display_name=pipeline,
        name=pipeline,
        description=description,
        namespace=access.namespace if server.multi_user else None,
    )
    with translate_api_errors(access):
        try:
            return str(server.client.pipelines.pipeline_service_create_pipeline(pipeline=request).pipeline_id)
        except ApiException as error:
            if error.status != 409:
                raise
    pipeline_id = find_pipeline(server, access, pipeline)  # another client created it in the meantime
    assert pipeline_id is not None
    return pipeline_id


def differences(old: Any, package: Path) -> list[str]:
    """Lines `+ key: value`, `- key: value` and `~ key: old -> new`; the same change in several stages is one line.

    old is pipeline_spec of a version as returned by the API.
    """
    before = dict(_flatten(_documents(old)))
    after = dict(_flatten(_documents(list(yaml.safe_load_all(package.read_text())))))
    stages: dict[tuple[str, str], list[str]] = {}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        stage, name = key
        if key not in before:
            line = f"+ {{}}{name}: {after[key]}"
        elif key not in after:
            line = f"- {{}}{name}: {before[key]}"
        else:
            line = f"~ {{}}{name}: {before[key]} -> {after[key]}"
        stages.setdefault((name, line), []).append(stage)
    return [
        line.replace("{}", f"{', '.join(names)}: " if names[0] else "", 1)
        for (_, line), names in sorted(stages.items())
    ]


def _documents(spec: Any) -> dict[str, Any]:
    """{"pipeline": ..., "platform": ...} of a compiled file (two YAML documents) or of the API (one object)."""
    if isinstance(spec, list):
        return {"pipeline": spec[0], "platform": spec[1] if len(spec) > 1 else {}}
    if isinstance(spec, dict) and "pipeline_spec" in spec:
        return {"pipeline": spec["pipeline_spec"], "platform": spec.get("platform_spec") or {}}
    return {"pipeline": spec or {}, "platform": {}}


def _flatten(value: Any, key: str = "") -> Iterator[tuple[tuple[str, str], str]]:
    """Yield ((stage, dotted key), text) for every leaf, including those of settings, which are JSON strings.

    The SDK version is skipped, and so are the keys that kfp duplicates for older servers, and the settings of the whole run that every
    task has for MLflow: the arguments of the tasks have them too.
    """
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            if not IGNORED_KEYS.search(f"{key}.{name}"):
                yield from _flatten(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(filter(_is_compared, value)):
            yield from _flatten(inner, f"{key}[{number}]")
    else:
        # The API returns all numbers as floats.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        text = repr(float(value)).removesuffix(".0") if is_number else json.dumps(value, ensure_ascii=False)
        yield _stage_and_key(key), text


def _is_compared(item: Any) -> bool:
    """Whether an item of a list matters; what differs in a variable with all settings is in the settings of the stages."""
    return not (isinstance(item, dict) and item.get("name") == SETTINGS_VARIABLE)


def _stage_and_key(key: str) -> tuple[str, str]:
    """The stage ("" for the pipeline itself) and the readable key of a path in the spec."""
    key = key.removeprefix("pipeline.").removeprefix("platform.platforms.kubernetes.")
    key = re.sub(r"^root\.inputDefinitions\.parameters\.(\w+)\.defaultValue", r"run parameter \1", key)
    stage = re.match(r"components\.comp-exit-handler-\d+\.dag\.tasks\.|deploymentSpec\.executors\.exec-", key)
    name, _, key = key[stage.end() :].partition(".") if stage else ("", "", key)
    return name, key.replace("inputs.parameters.settings.runtimeValue.constant", "settings")
