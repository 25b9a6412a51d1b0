"""A version in MLflow's model registry, whatever was decided; the alias moves only to what was promoted."""

from collections.abc import Mapping

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.mlflow import connect, warn

ALIAS = "champion"


def register_version(
    tracking: TrackingConfig, *, source: str, run_id: str, decision: str, reason: str, lineage: Mapping[str, str]
) -> str:
    """Register the model folder or URI with its lineage as tags; return the version, or "" when there is no registry.

    promote moves the alias `champion` to it; reject leaves the alias and says why in a tag. As everywhere, a registry that
    cannot be reached is a warning, not a failure. A stage that is run again finds the version it made.
    """
    if not tracking.enabled or not tracking.uri:
        return ""
    try:
        client = connect(tracking.uri)
        name = tracking.registered_model
        if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name)
        told = {"decision": decision, "reason": reason, "rlhf.run_id": run_id, **lineage}
        tags = {key: redact(value) for key, value in told.items()}
        version = next(
            (v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("rlhf.run_id") == run_id), None
        ) or client.create_model_version(name, source=source, tags=tags)
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
        if decision == "promote":
            client.set_registered_model_alias(name, ALIAS, version.version)
        return str(version.version)
    except Exception as error:  # tracking never fails a run
        warn(error)
        return ""
