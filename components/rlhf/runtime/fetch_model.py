"""Download a published model, and verify it against its manifest before it is served.

    python -m components.rlhf.runtime.fetch_model s3://BUCKET/PREFIX FOLDER

Access to S3 is that of the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3, AWS_REGION.
"""

import shutil
import sys
from pathlib import Path

import click

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.copy import download_prefix
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact_output


def fetch_model(uri: str, folder: Path, config: StorageConfig) -> str:
    """Download the policy at uri to a new folder; return its digest. Raises InputError if it is not what its manifest says.

    A folder that is there is that of an earlier attempt, which is complete; it is only verified.
    """
    parent, _, name = uri.rstrip("/").rpartition("/")
    if not parent.startswith("s3://") or parent == "s3://":
        raise InputError(f"{uri} is not s3://BUCKET/PREFIX; correct the address of the model.")
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}.fetching")
        shutil.rmtree(draft, ignore_errors=True)
        download_prefix(open_store(parent, config, click.echo), name, draft)
        open_artifact(draft, "policy_model")
        draft.rename(folder)
    return open_artifact(folder, "policy_model").digest


@click.command(help=__doc__)
@click.argument("uri")
@click.argument("folder", type=click.Path(path_type=Path))
def main(uri: str, folder: Path) -> None:
    redact_output()
    try:
        click.echo(f"{uri} has the digest {fetch_model(uri, folder, StorageConfig())}")
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
