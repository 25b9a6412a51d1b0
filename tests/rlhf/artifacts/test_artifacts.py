import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.artifacts.directory import atomic_directory, open_artifact, require_same_tokenizer
from components.rlhf.artifacts.manifest import KINDS, MANIFEST, FileEntry, Manifest, read_manifest, write_manifest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.text.errors import InputError

SHA_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # the example of FIPS 180-4


def make_artifact(directory: Path, **fields: Any) -> Manifest:
    (directory / "deep").mkdir(parents=True)
    (directory / "a.txt").write_bytes(b"abc")
    (directory / "deep/b.bin").write_bytes(b"\0" * 5)
    return write_manifest(directory, kind=fields.pop("kind", "prompts"), **fields)


def refusal(directory: Path, *kinds: str) -> str:
    with pytest.raises(InputError) as caught:
        open_artifact(directory, *(kinds or ("prompts",)))
    return str(caught.value)


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    change(content)
    (directory / MANIFEST).write_text(json.dumps(content), encoding="utf-8")


# --- writing ---


def test_directory_appears_atomically(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with atomic_directory(target) as folder:
        assert folder.parent == target.parent  # one file system, so that the rename is atomic
        (folder / "a").write_text("1", encoding="utf-8")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1", encoding="utf-8")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_replaced_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as folder:
        (folder / "old").write_text("1", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as folder:
        (folder / "new").write_text("2", encoding="utf-8")
        raise ZeroDivisionError
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_directory(target) as folder:
        (folder / "new").write_text("2", encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_leftovers_of_a_crashed_write_are_discarded(tmp_path: Path) -> None:
    stale = tmp_path / f".out.writing-{os.getpid()}"
    stale.mkdir()
    (stale / "stale").touch()
    with atomic_directory(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_unwritable_parent_is_refused(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError) as caught, atomic_directory(tmp_path / "out"):
        pass
    assert str(caught.value) == f"{tmp_path} is not writable; choose another output folder."


def test_file_as_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="file is not writable; choose another output folder"),
        atomic_directory(tmp_path / "file/out"),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_parent_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with (
        pytest.raises(InputError, match="is not writable; choose another output folder"),
        atomic_directory(tmp_path / "out"),
    ):
        pass


def test_full_disk_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"{tmp_path} has no space left for out; free some space and run again."
    assert list(tmp_path.iterdir()) == []


def test_other_os_errors_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.EIO, "I/O error")


# --- the manifest ---


def test_manifest_has_the_expected_fields(tmp_path: Path) -> None:
    manifest = make_artifact(
        tmp_path / "a", settings="abc", parents={"base": "d" * 64}, tokenizer_digest="t", facts={"n": 3}
    )
    assert manifest.files == {
        "a.txt": FileEntry(sha256=SHA_OF_ABC, size=3),
        "deep/b.bin": FileEntry(sha256=hashlib.sha256(b"\0\0\0\0\0").hexdigest(), size=5),
    }
    assert manifest.config_digest == SHA_OF_ABC
    assert manifest.created_at.endswith("+00:00")
    assert manifest.schema_version == 1
    assert read_manifest(tmp_path / "a") == manifest
    assert open_artifact(tmp_path / "a", "prompts") == manifest


def test_manifest_in_subfolder_is_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "a/deep").mkdir(parents=True)
    (tmp_path / "a/deep" / MANIFEST).write_bytes(b"abc")
    assert list(write_manifest(tmp_path / "a", kind="code").files) == [f"deep/{MANIFEST}"]


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'promts' is not an artifact kind"):
        write_manifest(tmp_path, kind="promts")
    assert not (tmp_path / MANIFEST).exists()
    assert len(KINDS) == 12


def test_digest_covers_everything_but_created_at_and_measurements(tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "a")
    assert dataclasses.replace(manifest, created_at="1970-01-01T00:00:00+00:00").digest == manifest.digest
    changes: dict[str, Any] = {
        "kind": "demonstrations",
        "files": {},
        "parents": {"base": "0" * 64},
        "tokenizer_digest": "x",
        "chat_template_digest": "x",
        "config_digest": "x",
        "code_revision": "x",
        "facts": {"n": 1},
        "schema_version": 2,
    }
    assert {"created_at", "measurements", *changes} == {field.name for field in dataclasses.fields(Manifest)}
    digests = {dataclasses.replace(manifest, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {manifest.digest}) == len(changes) + 1


def test_digest_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    manifest = make_artifact(tmp_path / "a")
    backwards = dataclasses.replace(manifest, files=dict(reversed(manifest.files.items())))
    assert list(backwards.files) != list(manifest.files)
    assert backwards.digest == manifest.digest


def test_metadata_is_flat(tmp_path: Path) -> None:
    manifest = make_artifact(
        tmp_path / "a", parents={"base_model": "d" * 64}, facts={"num_train": 3, "score": 0.5, "source": "x"}
    )
    metadata = manifest.metadata()
    assert metadata == {
        "kind": "prompts",
        "digest": manifest.digest,
        "tokenizer_digest": "",
        "chat_template_digest": "",
        "config_digest": "",
        "code_revision": manifest.code_revision,
        "num_bytes": 8,
        "parent_base_model": "d" * 64,
        "num_train": 3,
        "score": 0.5,
        "source": "x",
    }
    assert all(type(value) in (str, int, float) for value in metadata.values())


# --- opening ---


def test_one_of_several_kinds_is_accepted(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    assert open_artifact(tmp_path / "a", "demonstrations", "prompts").kind == "prompts"


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a") == f"{tmp_path / 'a'} is not a folder; an artifact is a folder with a {MANIFEST}."


def test_missing_manifest_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    assert refusal(tmp_path / "a").startswith(
        f"{tmp_path / 'a'} has no {MANIFEST}: it is incomplete or not an artifact"
    )


def test_wrong_kind_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    message = refusal(tmp_path / "a", "sft_model", "base_model")
    assert message == f"{tmp_path / 'a'} is a prompts, expected a sft_model or base_model; pass the right artifact."


@pytest.mark.parametrize("content", [b"abd", b"abcd", b""])
def test_modified_file_is_refused(tmp_path: Path, content: bytes) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "a/a.txt").write_bytes(content)
    assert refusal(tmp_path / "a").startswith(f"{tmp_path / 'a/a.txt'} does not match its manifest (sha256 differs)")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "a/deep/b.bin").unlink()
    assert refusal(tmp_path / "a").startswith(f"{tmp_path / 'a'} lacks deep/b.bin, which its manifest lists")


def test_added_file_is_refused(tmp_path: Path) -> None:
    """An added chat template or index of weights would change what is loaded."""
    make_artifact(tmp_path / "a")
    (tmp_path / "a/deep/chat_template.jinja").touch()
    message = refusal(tmp_path / "a")
    assert (
        message
        == f"{tmp_path / 'a'} contains deep/chat_template.jinja, which its manifest does not list; delete that file."
    )


@pytest.mark.parametrize("name", ["../outside.txt", "deep/../../outside.txt", "/etc/hostname"])
def test_path_outside_the_artifact_is_refused(tmp_path: Path, name: str) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "outside.txt").write_bytes(b"abc")
    edit(tmp_path / "a", lambda content: content["files"].update({name: content["files"]["a.txt"]}))
    assert f"its manifest lists {name}, which is not a path inside" in refusal(tmp_path / "a")


def test_link_out_of_the_artifact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_bytes(b"abc")
    make_artifact(tmp_path / "a")
    (tmp_path / "a/a.txt").unlink()
    (tmp_path / "a/a.txt").symlink_to(tmp_path / "outside.txt")
    assert f"{tmp_path}/a/a.txt is a symbolic link" in refusal(tmp_path / "a")


def test_other_schema_version_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a")
    edit(tmp_path / "a", lambda content: content.update(schema_version=2))
    assert refusal(tmp_path / "a") == (
        f"{tmp_path / 'a' / MANIFEST} has schema version 2, expected 1; create the artifact again."
    )
    edit(tmp_path / "a", lambda content: content.pop("schema_version"))
    assert "has schema version None" in refusal(tmp_path / "a")


GARBAGE = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "no files": b'{"schema_version": 1, "kind": "prompts"}',
    "files are a list": b'{"schema_version": 1, "kind": "prompts", "files": []}',
    "an entry is a text": b'{"schema_version": 1, "kind": "prompts", "files": {"a": "b"}}',
    "an entry lacks its size": b'{"schema_version": 1, "kind": "prompts", "files": {"a": {"sha256": ""}}}',
    "no kind": b'{"schema_version": 1, "files": {}}',
    "an unknown field": b'{"schema_version": 1, "kind": "prompts", "files": {}, "x": 1}',
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_malformed_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    make_artifact(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_bytes(content)
    assert refusal(tmp_path / "a").startswith(f"{tmp_path / 'a' / MANIFEST} is not a manifest (")


# --- lineage ---


def manifest_with(tokenizer: str = "t", template: str = "c") -> Manifest:
    return Manifest(kind="prompts", files={}, tokenizer_digest=tokenizer, chat_template_digest=template)


def test_same_tokenizer_is_accepted() -> None:
    require_same_tokenizer(prompts=(Path("/p"), manifest_with()), sft_model=(Path("/s"), manifest_with()))
    # A judge has no tokenizer, and may be in any position.
    require_same_tokenizer(
        judge=(Path("/j"), manifest_with("", "")),
        prompts=(Path("/p"), manifest_with()),
        sft_model=(Path("/s"), manifest_with()),
    )
    require_same_tokenizer()


@pytest.mark.parametrize(
    ("other", "name"), [(manifest_with(tokenizer="u"), "tokenizers"), (manifest_with(template="d"), "chat templates")]
)
def test_different_tokenizers_are_refused(other: Manifest, name: str) -> None:
    with pytest.raises(InputError) as caught:
        require_same_tokenizer(
            prompts=(Path("/p"), manifest_with()),
            sft_model=(Path("/s"), manifest_with()),
            reward_model=(Path("/r"), other),
        )
    assert str(caught.value) == (
        f"The prompts (/p) and the reward_model (/r) have different {name}; "
        "token ids would mean different text. Train both from the same base model."
    )


def test_revision_of_an_image_comes_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images have no git repository; otherwise two builds of the same version would share checkpoints."""
    monkeypatch.setenv("RLHF_CODE_REVISION", "abc123")
    code_revision.cache_clear()
    assert code_revision() == "abc123"
    monkeypatch.delenv("RLHF_CODE_REVISION")
    code_revision.cache_clear()
    assert code_revision() != "abc123"
