"""Registration of model versions in MLflow's model registry."""

from collections.abc import Mapping

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.answers import warn
from components.rlhf.tracking.runs import RUN_ID_TAG, connect

ALIAS = "champion"


def register_version(
    tracking: TrackingConfig, *, source: str, run_id: str, decision: str, reason: str, lineage: Mapping[str, str]
) -> str:
    """Register a model folder or URI with its lineage as tags; return the version, or "" if there is no registry.

    The decision promote moves the alias `champion` to the version. Errors of MLflow are warnings. If the run has
    registered a version already, that version is updated.
    """
    if not tracking.enabled or not tracking.uri:
        return ""
    try:
        client = connect(tracking.uri)
        name = tracking.registered_model
        if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name)
        tags = {"decision": decision, "reason": reason, RUN_ID_TAG: run_id, **lineage}
        tags = {key: redact(value) for key, value in tags.items()}
        versions = client.search_model_versions(f"name = '{name}'")
        version = next((version for version in versions if version.tags.get(RUN_ID_TAG) == run_id), None)
        version = version or client.create_model_version(name, source=source, tags=tags)
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        if decision == "promote":
            client.set_registered_model_alias(name, ALIAS, version.version)
        return str(version.version)
    except Exception as error:  # MLflow must not fail a run
        warn(error)
        return ""
