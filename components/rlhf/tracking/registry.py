"""Registration of model versions in MLflow's model registry."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.answers import code_of, warn
from components.rlhf.tracking.runs import RUN_ID_TAG, connect, find_parent_run
from components.rlhf.tracking.texts import equals

CHAMPION, CANDIDATE = "champion", "candidate"
MODEL_FOLDER = "model"  # among the artifacts of the parent run
MODEL_NOTE = (
    "Policies of kfp-rlhf. `champion` is the last one that the gate has promoted, `candidate` the last one of any run. A version links to "
    "its weights by address and digest; `mlflow.pyfunc.load_model` and `mlflow models serve` load them from there."
)
MAX_DESCRIPTION_CHARS = 5000


def register_version(
    tracking: TrackingConfig,
    *,
    folder: Path,
    run_id: str,
    decision: str,
    reason: str,
    lineage: Mapping[str, str],
    description: str = "",
) -> str:
    """Register a folder in MLflow's model format, with its lineage as tags; return the version, or "" if there is no registry.

    The folder becomes an artifact of the parent run. The alias `candidate` moves to the version, and with the decision promote also
    `champion`. Without a decision, for which a person is waited for, the version has no tags of it. Errors of MLflow are warnings. If
    the run has registered a version already, that version is updated.
    """
    if not tracking.enabled or not tracking.uri:
        return ""
    try:
        client = connect(tracking.uri)
        name = tracking.registered_model
        _require_model(client, name)
        verdict = {"decision": decision, "reason": reason} if decision else {}
        tags = {**verdict, RUN_ID_TAG: run_id, **lineage}
        tags = {key: redact(value) for key, value in tags.items()}
        description = redact(description)[:MAX_DESCRIPTION_CHARS]
        version = find_version(client, name, run_id)
        if version is None:
            parent = find_parent_run(client, tracking, run_id)
            client.log_artifacts(parent.id, str(folder), MODEL_FOLDER)
            source = f"{client.get_run(parent.id).info.artifact_uri.rstrip('/')}/{MODEL_FOLDER}"
            version = client.create_model_version(
                name, source=source, run_id=parent.id, tags=tags, description=description
            )
        else:
            if version.tags.get("digest") != tags.get("digest"):  # the resumed run has trained another policy
                client.log_artifacts(version.run_id, str(folder), MODEL_FOLDER)
            client.update_model_version(name, version.version, description)
            for key, value in tags.items():
                client.set_model_version_tag(name, version.version, key, value)
        for alias in (CANDIDATE, CHAMPION) if decision == "promote" else (CANDIDATE,):
            client.set_registered_model_alias(name, alias, version.version)
        return str(version.version)
    except Exception as error:  # MLflow must not fail a run
        warn(error, tracking)
        return ""


def make_champion(tracking: TrackingConfig, run_id: str) -> str:
    """Move the alias `champion` to the version of a run, if that was promoted; return it, else "". Errors of MLflow are warnings."""
    if not tracking.enabled or not tracking.uri:
        return ""
    try:
        client = connect(tracking.uri)
        version = find_version(client, tracking.registered_model, run_id)
        if version is None or version.tags.get("decision") != "promote":
            return ""
        client.set_registered_model_alias(tracking.registered_model, CHAMPION, version.version)
        return str(version.version)
    except Exception as error:  # MLflow must not fail a sweep
        warn(error, tracking)
        return ""


def find_version(client: Any, name: str, run_id: str) -> Any:
    """The version that a run has registered, or None."""
    token: str | None = ""
    while token is not None:
        page = client.search_model_versions(equals("name", name), max_results=200, page_token=token or None)
        for version in page:
            if version.name == name and version.tags.get(RUN_ID_TAG) == run_id:
                return version
        token = page.token or None
    return None


def _require_model(client: Any, name: str) -> None:
    """Create the registered model if it is missing."""
    try:
        client.get_registered_model(name)
    except Exception as error:
        if code_of(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            client.create_registered_model(name, description=MODEL_NOTE)
        except Exception as conflict:  # another run has created it meanwhile
            if code_of(conflict) != "RESOURCE_ALREADY_EXISTS":
                raise
