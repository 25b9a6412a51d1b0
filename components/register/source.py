"""The location of a policy that a registered version names."""

from pathlib import Path

from components.rlhf.runtime.executor import MODEL_URI, PUBLISHED_URI, input_metadata

OPENABLE = ("s3://", "gs://", "file://", "/")


def source_of(executor_input: str, policy: Path) -> tuple[str, str]:
    """The URI of the policy, and a remark if MLflow cannot open it.

    The published copy if there is one (storage.publish_uri), else KFP's: minio:// and other addresses of its store mean something
    only inside of Kubeflow Pipelines.
    """
    if not executor_input:
        return str(policy.resolve()), ""
    uri = next(filter(None, (input_metadata(executor_input, "policy", key) for key in (PUBLISHED_URI, MODEL_URI))), "")
    remark = "; only Kubeflow Pipelines can open this address, set storage.publish_uri to publish models elsewhere"
    return uri, "" if uri.startswith(OPENABLE) else remark
