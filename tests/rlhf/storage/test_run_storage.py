"""What one run keeps in a store, in a folder and on a real S3 server: checkpoints are deleted, published models are not."""

import json
from pathlib import Path

import pytest

from components.rlhf.checkpoints.run import MARKER, delete_run, delete_run_if_empty, mark_run, run_prefix
from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.runtime.stage import stage_run
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError
from tests.support.seaweed import SeaweedFS


def fill(store: Store, *keys: str) -> None:
    for key in keys:
        store.write(key, b"x")


def test_only_the_marked_folder_of_a_run_is_deleted(store: Store) -> None:
    others = {"run-2/ppo/a", "run-11/sft/a", "1/ppo/model/manifest.json", "a"}
    mark_run(store, "1")
    fill(store, "run-1/ppo/digest/step/manifest.json", "run-1/sft/digest/lease.json", *others)
    assert not delete_run(store, "2")  # no marker
    assert delete_run(store, "1")
    assert set(store.list()) == others
    assert not delete_run(store, "1")


def test_folder_of_a_run_goes_with_its_last_checkpoint(store: Store) -> None:
    mark_run(store, "1")
    fill(store, "run-1/sft/digest/a", "run-2/b")
    delete_run_if_empty(store, "1")
    assert len(store.list()) == 3
    store.delete("run-1/sft")
    delete_run_if_empty(store, "1")
    assert set(store.list()) == {"run-2/b"}


def test_marker_of_another_run_protects_a_folder(store: Store) -> None:
    store.write(f"{run_prefix('1')}/{MARKER}", json.dumps({"run_id": "2"}).encode())
    fill(store, "run-1/ppo/a")
    assert not delete_run(store, "1") and len(store.list()) == 2


@pytest.mark.parametrize("run_id", ["", ".", "..", "a/b", "/", "a\n"])
def test_run_id_must_be_the_name_of_a_folder(store: Store, run_id: str) -> None:
    for call in (mark_run, delete_run):
        with pytest.raises(InputError, match="which cannot be the name of a folder"):
            call(store, run_id)


@pytest.mark.parametrize("prefix", ["", "/", ".", "..", "a/../.."])
def test_whole_store_is_never_deleted(store: Store, prefix: str) -> None:
    fill(store, "a/b")
    with pytest.raises(ValueError, match="is not a prefix that can be deleted"):
        store.delete(prefix)
    assert set(store.list()) == {"a/b"}


OVERLAPPING = [
    ("s3://b/x", "s3://b/x"), ("s3://b/x", "s3://b/x/"), ("s3://b", "s3://b/x"), ("s3://b/x/y", "s3://b/x"),
    ("s3://b//x", "s3://b/x"), ("/a", "/a/b"), ("file:///a/b", "/a"), ("/a/../b", "/b"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), OVERLAPPING)
def test_locations_that_contain_one_another_are_refused(first: str, second: str) -> None:
    for one, other in (("checkpoint_uri", "publish_uri"), ("publish_uri", "checkpoint_uri")):
        with pytest.raises(ValueError, match="checkpoints are deleted, so use separate prefixes"):
            StorageConfig.model_validate({one: first, other: second})


@pytest.mark.parametrize("key", ["checkpoint_uri", "publish_uri"])
@pytest.mark.parametrize("uri", ["s3://b", "s3://b/", "s3://b/uploads", "s3://b/uploads/x"])
def test_locations_that_contain_the_uploads_are_refused(key: str, uri: str) -> None:
    with pytest.raises(ValueError, match="checkpoints are deleted, so use separate prefixes"):
        StorageConfig.model_validate({"uri": "s3://b", key: uri})
    StorageConfig.model_validate({"uri": "s3://b", key: "s3://b/other"})


@pytest.mark.parametrize(
    ("first", "second"),
    [("s3://b/x", "s3://b/xy"), ("s3://a", "s3://b"), ("/a", "s3://a"), ("/a/b", "/a/c"), ("/a", "/ab")],
)
def test_separate_locations_are_accepted(first: str, second: str) -> None:
    StorageConfig(checkpoint_uri=first, publish_uri=second)


@pytest.mark.slow
def test_a_run_that_ends_well_keeps_its_published_models(
    server: SeaweedFS, s3: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage publishes next to the checkpoints, and the end of the run deletes only those."""
    monkeypatch.setenv("RLHF_RUN_ID", "run-1")
    storage = StorageConfig(
        endpoint_url=server.url,
        region="us-east-1",
        checkpoint_uri="s3://models/ends-well/checkpoints",
        publish_uri="s3://models/ends-well/models",
    )
    with stage_run(
        "demo", RegisterStageConfig, settings='{"decision": "promote"}', storage=storage.canonical_json()
    ) as run:
        run.write_artifact(
            "model", tmp_path / "model", lambda folder: (folder / "config.json").write_text("{}"), kind="sft_model",
            parents={}, facts={},
        )  # fmt: skip
    checkpoints = open_store("s3://models/ends-well/checkpoints", storage)
    mark_run(checkpoints, "run-1")
    fill(checkpoints, "run-run-1/demo/digest/lease.json")
    assert delete_run(checkpoints, "run-1")
    everything = open_store("s3://models/ends-well", storage)
    assert set(everything.list()) == {f"models/run-1/demo/model/{name}" for name in ("config.json", "manifest.json")}
