import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.artifacts.directory import open_artifact, require_same_tokenizer, writing
from components.rlhf.artifacts.manifest import KINDS, MANIFEST, FileEntry, Manifest, read_manifest, write_manifest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.text.errors import InputError

SHA_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # the standard's own example


def make(directory: Path, **fields: Any) -> Manifest:
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


def test_what_is_written_appears_at_the_end_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with writing(target) as draft:
        assert draft.parent == target.parent  # one file system, so that the rename is atomic
        (draft / "a").write_text("1", encoding="utf-8")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out") as draft:
        (draft / "a").write_text("1", encoding="utf-8")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_survives_a_failure_and_gives_way_to_success(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with writing(target) as draft:
        (draft / "old").write_text("1", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), writing(target) as draft:
        (draft / "new").write_text("2", encoding="utf-8")
        raise ZeroDivisionError
    assert [path.name for path in target.iterdir()] == ["old"]
    with writing(target) as draft:
        (draft / "new").write_text("2", encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_draft_that_a_death_left_behind_does_not_leak_into_the_next(tmp_path: Path) -> None:
    stale = tmp_path / f".out.writing-{os.getpid()}"
    stale.mkdir()
    (stale / "stale").touch()
    with writing(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_parent_that_cannot_be_written(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError) as caught, writing(tmp_path / "out"):
        pass
    assert str(caught.value) == f"{tmp_path} is not writable; choose another output folder."


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="file is not writable; choose another output folder"),
        writing(tmp_path / "file/out"),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="is not writable; choose another output folder"), writing(tmp_path / "out"):
        pass


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, writing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"{tmp_path} has no room left while writing out; free some space and run again."
    assert list(tmp_path.iterdir()) == []


def test_other_failures_of_the_system_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O"), writing(tmp_path / "out"):
        raise OSError(errno.EIO, "I/O error")


# --- the manifest ---


def test_a_manifest_by_hand(tmp_path: Path) -> None:
    made = make(tmp_path / "a", settings="abc", parents={"base": "d" * 64}, tokenizer_digest="t", facts={"n": 3})
    assert made.files == {
        "a.txt": FileEntry(sha256=SHA_OF_ABC, size=3),
        "deep/b.bin": FileEntry(sha256=hashlib.sha256(b"\0\0\0\0\0").hexdigest(), size=5),
    }
    assert made.config_digest == SHA_OF_ABC
    assert made.created_at.endswith("+00:00")
    assert made.schema_version == 1
    assert read_manifest(tmp_path / "a") == made
    assert open_artifact(tmp_path / "a", "prompts") == made


def test_a_file_called_manifest_further_down_is_content(tmp_path: Path) -> None:
    (tmp_path / "a/deep").mkdir(parents=True)
    (tmp_path / "a/deep" / MANIFEST).write_bytes(b"abc")
    assert list(write_manifest(tmp_path / "a", kind="code").files) == [f"deep/{MANIFEST}"]


def test_only_known_kinds_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'promts' is not a kind of artifact"):
        write_manifest(tmp_path, kind="promts")
    assert not (tmp_path / MANIFEST).exists()
    assert len(KINDS) == 10


def test_the_digest_ignores_the_time_of_creation_and_nothing_else(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    assert dataclasses.replace(made, created_at="1970-01-01T00:00:00+00:00").digest == made.digest
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
    assert {"created_at", *changes} == {field.name for field in dataclasses.fields(Manifest)}
    digests = {dataclasses.replace(made, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {made.digest}) == len(changes) + 1


def test_the_digest_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    made = make(tmp_path / "a")
    backwards = dataclasses.replace(made, files=dict(reversed(made.files.items())))
    assert list(backwards.files) != list(made.files)
    assert backwards.digest == made.digest


def test_metadata_is_flat(tmp_path: Path) -> None:
    made = make(tmp_path / "a", parents={"base_model": "d" * 64}, facts={"num_train": 3, "score": 0.5, "source": "x"})
    metadata = made.metadata()
    assert metadata == {
        "kind": "prompts",
        "digest": made.digest,
        "tokenizer_digest": "",
        "chat_template_digest": "",
        "config_digest": "",
        "code_revision": made.code_revision,
        "num_bytes": 8,
        "parent_base_model": "d" * 64,
        "num_train": 3,
        "score": 0.5,
        "source": "x",
    }
    assert all(type(value) in (str, int, float) for value in metadata.values())


# --- opening ---


def test_any_of_several_kinds(tmp_path: Path) -> None:
    make(tmp_path / "a")
    assert open_artifact(tmp_path / "a", "demonstrations", "prompts").kind == "prompts"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a") == f"{tmp_path / 'a'} is not a folder; an artifact is a folder with a {MANIFEST}."


def test_no_manifest(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    assert refusal(tmp_path / "a").startswith(f"{tmp_path / 'a'} has no {MANIFEST}: it is incomplete or no artifact")


def test_the_wrong_kind(tmp_path: Path) -> None:
    make(tmp_path / "a")
    said = refusal(tmp_path / "a", "sft_model", "base_model")
    assert (
        said == f"{tmp_path / 'a'} is a prompts, but a sft_model or base_model is needed here; pass the right artifact."
    )


@pytest.mark.parametrize("content", [b"abd", b"abcd", b""])
def test_an_altered_file(tmp_path: Path, content: bytes) -> None:
    make(tmp_path / "a")
    (tmp_path / "a/a.txt").write_bytes(content)
    assert refusal(tmp_path / "a").startswith(f"{tmp_path / 'a/a.txt'} is not what its manifest says (sha256 differs)")


def test_a_missing_file(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a/deep/b.bin").unlink()
    assert refusal(tmp_path / "a").startswith(f"{tmp_path / 'a'} lacks deep/b.bin, which its manifest lists")


def test_an_added_file(tmp_path: Path) -> None:
    """A chat template or an index of weights laid beside the others would change what is loaded."""
    make(tmp_path / "a")
    (tmp_path / "a/deep/chat_template.jinja").touch()
    said = refusal(tmp_path / "a")
    assert (
        said == f"{tmp_path / 'a'} holds deep/chat_template.jinja, which its manifest does not list; delete that file."
    )


@pytest.mark.parametrize("name", ["../outside.txt", "deep/../../outside.txt", "/etc/hostname"])
def test_a_manifest_that_points_outside(tmp_path: Path, name: str) -> None:
    make(tmp_path / "a")
    (tmp_path / "outside.txt").write_bytes(b"abc")
    edit(tmp_path / "a", lambda content: content["files"].update({name: content["files"]["a.txt"]}))
    assert f"its manifest names {name}, which lies outside" in refusal(tmp_path / "a")


def test_a_link_that_points_outside(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_bytes(b"abc")
    make(tmp_path / "a")
    (tmp_path / "a/a.txt").unlink()
    (tmp_path / "a/a.txt").symlink_to(tmp_path / "outside.txt")
    assert f"{tmp_path}/a/a.txt is a link" in refusal(tmp_path / "a")


def test_another_schema_version(tmp_path: Path) -> None:
    make(tmp_path / "a")
    edit(tmp_path / "a", lambda content: content.update(schema_version=2))
    assert refusal(tmp_path / "a") == (
        f"{tmp_path / 'a' / MANIFEST} has schema version 2; this version reads 1. Make the artifact again."
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
def test_a_manifest_that_is_garbage(tmp_path: Path, content: bytes) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_bytes(content)
    assert refusal(tmp_path / "a").startswith(f"{tmp_path / 'a' / MANIFEST} is not a manifest (")


# --- lineage ---


def manifest(tokenizer: str = "t", template: str = "c") -> Manifest:
    return Manifest(kind="prompts", files={}, tokenizer_digest=tokenizer, chat_template_digest=template)


def test_the_same_tokenizer() -> None:
    require_same_tokenizer(prompts=(Path("/p"), manifest()), sft_model=(Path("/s"), manifest()))
    # A judge has no tokenizer, and stands anywhere in the row.
    require_same_tokenizer(
        judge=(Path("/j"), manifest("", "")), prompts=(Path("/p"), manifest()), sft_model=(Path("/s"), manifest())
    )
    require_same_tokenizer()


@pytest.mark.parametrize(
    ("other", "what"), [(manifest(tokenizer="u"), "tokenizers"), (manifest(template="d"), "chat templates")]
)
def test_different_tokenizers_name_both_artifacts(other: Manifest, what: str) -> None:
    with pytest.raises(InputError) as caught:
        require_same_tokenizer(
            prompts=(Path("/p"), manifest()), sft_model=(Path("/s"), manifest()), reward_model=(Path("/r"), other)
        )
    assert str(caught.value) == (
        f"The prompts (/p) and the reward_model (/r) have different {what}; "
        "token ids would mean different text. Train both from the same base model."
    )


def test_an_image_says_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images have no git; without this, two builds of one version would share checkpoints."""
    monkeypatch.setenv("RLHF_CODE_REVISION", "abc123")
    code_revision.cache_clear()
    assert code_revision() == "abc123"
    monkeypatch.delenv("RLHF_CODE_REVISION")
    code_revision.cache_clear()
    assert code_revision() != "abc123"
