"""A published model is verified when it is downloaded to be served."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from components.rlhf.artifacts.manifest import MANIFEST, write_manifest
from components.rlhf.config.storage import StorageConfig
from components.rlhf.runtime.fetch_model import fetch_model, main
from components.rlhf.storage.copy import upload_folder
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError
from tests.support.limited_s3 import LimitedS3


def test_model_is_downloaded_verified_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    policy, target = tmp_path / "policy", tmp_path / "served" / "policy"
    policy.mkdir()
    target.parent.mkdir()
    (policy / "config.json").write_text("{}")
    digest = write_manifest(policy, kind="policy_model").digest
    with LimitedS3() as server:
        storage = StorageConfig(endpoint_url=server.url, retry_minutes=0.01)
        upload_folder(open_store("s3://bucket/models", storage), policy, "run/ppo", last=MANIFEST)
        (target.with_name(".policy.fetching")).mkdir()  # of an attempt that was killed
        assert fetch_model("s3://bucket/models/run/ppo/", target, storage) == digest
        assert (target / "config.json").read_text() == "{}"
        assert [path.name for path in target.parent.iterdir()] == ["policy"]
        server.objects.clear()
        assert fetch_model("s3://bucket/models/run/ppo", target, storage) == digest  # of an earlier attempt

        upload_folder(open_store("s3://bucket/models", storage), policy, "changed", last=MANIFEST)
        server.objects["models/changed/config.json"] = (b"[]", {})
        with pytest.raises(InputError):
            fetch_model("s3://bucket/models/changed", tmp_path / "other", storage)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("uri", ["s3://bucket", "hf://me/policy", "/folder"])
def test_other_addresses_are_refused(tmp_path: Path, uri: str) -> None:
    result = CliRunner().invoke(main, [uri, str(tmp_path / "x")])
    assert result.exit_code == 1 and "is not s3://BUCKET/PREFIX" in result.output
