"""The location of a policy that a registered version names."""

from dataclasses import dataclass
from pathlib import Path

from components.rlhf.runtime.executor import MODEL_URI, PUBLISHED_ENDPOINT, PUBLISHED_URI, input_metadata

OPENABLE = ("s3://", "gs://", "file://", "/")


@dataclass(frozen=True)
class Source:
    """The address of a policy. note is a remark if MLflow cannot open it."""

    uri: str
    note: str = ""
    endpoint_url: str = ""  # of an S3 server other than AWS


def source_of(executor_input: str, policy: Path) -> Source:
    """The location of the policy.

    The published copy if there is one (storage.publish_uri), else KFP's: minio:// and other addresses of its store mean something
    only inside of Kubeflow Pipelines.
    """
    if not executor_input:
        return Source(str(policy.resolve()))
    published = input_metadata(executor_input, "policy", PUBLISHED_URI)
    if published:
        return Source(published, endpoint_url=input_metadata(executor_input, "policy", PUBLISHED_ENDPOINT))
    uri = input_metadata(executor_input, "policy", MODEL_URI)
    remark = "; only Kubeflow Pipelines can open this address, set storage.publish_uri to publish models elsewhere"
    return Source(uri, "" if uri.startswith(OPENABLE) else remark)
