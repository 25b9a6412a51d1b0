"""An S3 server that these tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import Store, open_store
from tests.support.seaweed import BUCKET, SeaweedFS, credentials

Open = Callable[..., Store]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    seaweed = SeaweedFS(tmp_path_factory.mktemp("seaweed") / "server")
    try:
        seaweed.start()
        yield seaweed
    finally:
        seaweed.kill()


@pytest.fixture
def s3(server: SeaweedFS, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Open:
    """s3(**settings) opens a store with one prefix per test; bucket= and log= may be passed too."""
    for name, value in credentials().items():
        monkeypatch.setenv(name, value)
    prefix = "".join(c if c.isalnum() else "-" for c in request.node.name)

    def open_s3(*, bucket: str = BUCKET, log: Callable[[str], None] | None = None, **changes: object) -> Store:
        config = StorageConfig.model_validate({"endpoint_url": server.url, "region": "us-east-1"} | changes)
        return open_store(f"s3://{bucket}/{prefix}", config, log)

    return open_s3


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder and a bucket, which must behave the same."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    open_s3: Open = request.getfixturevalue("s3")
    return open_s3()
