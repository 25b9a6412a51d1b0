"""Versions of the pipeline on a server: their names, uploading one, and what is different from the last."""

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
from pipelines.cluster.server import Server, ServerAccess, translate_api_errors

NEWEST_FIRST = "created_at desc"
DUPLICATED_KEYS = re.compile(
    r"\.(sdkVersion|resources\.(cpu|memory)(Limit|Request)|accelerator\.(count|type)|secretName|pvcMount\[\d+\]\.constant)$"
    r"|\.(inputDefinitions|inputs)\.parameters\.pipelinechannel--\w+$"  # what the compiler hands on from DAG to DAG
)


def version_name(pipeline: str, package: Path) -> str:
    """PIPELINE-PACKAGE_VERSION-REVISION-DIGEST: the same content always has the same name, and Kubernetes takes it as one."""
    revision = re.sub(r"[^a-z0-9]+", "-", code_revision().lower())
    short = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", revision)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()[:8]
    return f"{pipeline}-{importlib.metadata.version('kfp-rlhf')}-{short}-{digest}"


def find_pipeline(server: Server, access: ServerAccess, name: str) -> str | None:
    """The id of a pipeline by its name."""
    found = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
    with translate_api_errors(access):
        answer = server.client.list_pipelines(
            filter=json.dumps(found), namespace=access.namespace if server.multi_user else None
        )
    return answer.pipelines[0].pipeline_id if answer.pipelines else None


def newest_version(server: Server, access: ServerAccess, pipeline_id: str) -> Any:
    """The version that was uploaded last, or None."""
    with translate_api_errors(access):
        answer = server.client.list_pipeline_versions(pipeline_id, page_size=1, sort_by=NEWEST_FIRST)
    return answer.pipeline_versions[0] if answer.pipeline_versions else None


def upload(server: Server, access: ServerAccess, pipeline: str, package: Path) -> tuple[str, str]:
    """Upload the package as a version of the pipeline, which is made if it is not there; return both ids.

    A version of this very content is used again.
    """
    name = version_name(pipeline, package)
    description = f"kfp-rlhf {importlib.metadata.version('kfp-rlhf')}, revision {code_revision()}"
    pipeline_id = find_pipeline(server, access, pipeline)
    if pipeline_id is None:
        pipeline_id = _create(server, access, pipeline, description)
    known = _version_called(server, access, pipeline_id, name)
    if known is None:
        with translate_api_errors(access):
            known = server.client.upload_pipeline_version(
                str(package), name, pipeline_id=pipeline_id, description=description
            )
    return pipeline_id, known.pipeline_version_id


def _create(server: Server, access: ServerAccess, pipeline: str, description: str) -> str:
    """An empty pipeline: uploading one would make its first version, too, under a name that is not ours."""
    from kfp_server_api import V2beta1Pipeline

    wanted = V2beta1Pipeline(
        display_name=pipeline,
        name=pipeline,
        description=description,
        namespace=access.namespace if server.multi_user else None,
    )
    with translate_api_errors(access):
        try:
            return str(server.client.pipelines.pipeline_service_create_pipeline(pipeline=wanted).pipeline_id)
        except ApiException as error:
            if error.status != 409:
                raise
    found = find_pipeline(server, access, pipeline)  # somebody else was quicker
    assert found is not None
    return found


def _version_called(server: Server, access: ServerAccess, pipeline_id: str, name: str) -> Any:
    found = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
    with translate_api_errors(access):
        answer = server.client.list_pipeline_versions(pipeline_id, page_size=1, filter=json.dumps(found))
    return answer.pipeline_versions[0] if answer.pipeline_versions else None


def differences(old: Any, package: Path) -> list[str]:
    """Lines `+ key: value`, `- key: value` and `~ key: old -> new`; what changes alike in several stages is one line.

    old is pipeline_spec of a version as the API gives it.
    """
    before, after = dict(_flat(_documents(old))), dict(_flat(_documents(list(yaml.safe_load_all(package.read_text())))))
    stages: dict[tuple[str, str], list[str]] = {}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        stage, rest = key
        if key not in before:
            line = f"+ {{}}{rest}: {after[key]}"
        elif key not in after:
            line = f"- {{}}{rest}: {before[key]}"
        else:
            line = f"~ {{}}{rest}: {before[key]} -> {after[key]}"
        stages.setdefault((rest, line), []).append(stage)
    return [
        line.replace("{}", f"{', '.join(where)}: " if where[0] else "", 1)
        for (_, line), where in sorted(stages.items())
    ]


def _documents(spec: Any) -> dict[str, Any]:
    """Pipeline and platform of a compiled file (two YAML documents) or of the API (one object), under the same two names."""
    if isinstance(spec, list):
        return {"pipeline": spec[0], "platform": spec[1] if len(spec) > 1 else {}}
    if isinstance(spec, dict) and "pipeline_spec" in spec:
        return {"pipeline": spec["pipeline_spec"], "platform": spec.get("platform_spec") or {}}
    return {"pipeline": spec or {}, "platform": {}}


def _flat(value: Any, key: str = "") -> Iterator[tuple[tuple[str, str], str]]:
    """((stage, dotted key), text) of all leaves. Settings, which travel as JSON text, are opened.

    kfp's own version is left out, and so is what it writes twice for servers of the past.
    """
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            if not DUPLICATED_KEYS.search(f"{key}.{name}"):
                yield from _flat(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{number}]")
    else:
        # The API keeps numbers as floats.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        yield (
            _readable(key),
            repr(float(value)).removesuffix(".0") if is_number else json.dumps(value, ensure_ascii=False),
        )


def _readable(key: str) -> tuple[str, str]:
    """A place in the spec as people think of it: the stage ("" for the pipeline's own) and what of it."""
    key = key.removeprefix("pipeline.").removeprefix("platform.platforms.kubernetes.")
    key = re.sub(r"^root\.inputDefinitions\.parameters\.(\w+)\.defaultValue", r"run parameter \1", key)
    stage = re.match(r"components\.comp-exit-handler-\d+\.dag\.tasks\.|deploymentSpec\.executors\.exec-", key)
    name, _, rest = key[stage.end() :].partition(".") if stage else ("", "", key)
    return name, rest.replace("inputs.parameters.settings.runtimeValue.constant", "settings")
