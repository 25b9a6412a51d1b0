"""Artifacts from an untrusted store: each is unmodified, or refused with a readable error message."""

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import MANIFEST, read_manifest, write_manifest
from components.rlhf.text.errors import InputError
from tests.support.hostile_input import result_or_refusal

FUZZ = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"abc")
    (folder / "sub/b.txt").write_bytes(b"b")
    write_manifest(folder, kind="prompts", parents={"base_model": "0" * 64}, facts={"n": 1, "x": 0.5, "s": "t"})
    return folder


def paths_in(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all values in a manifest."""
    items = value.items() if isinstance(value, dict) else ()
    return [path, *(nested for key, inner in items for nested in paths_in(inner, (*path, key)))]


@FUZZ
@given(data=st.data())
def test_fuzzed_manifest_is_valid_or_refused(artifact: Path, data: st.DataObject) -> None:
    path = artifact / MANIFEST
    good = path.read_text(encoding="utf-8")
    content = json.loads(good)
    keys = data.draw(st.sampled_from(paths_in(content)))
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    match data.draw(st.sampled_from(["replace", "remove", "add", "rename"])) if keys else "whole":
        case "replace":
            parent[keys[-1]] = data.draw(JSON)
        case "remove":
            del parent[keys[-1]]
        case "add":
            parent[data.draw(st.text(max_size=10))] = data.draw(JSON)
        case "rename":
            parent[data.draw(st.text(max_size=10))] = parent.pop(keys[-1])
        case _:
            content = data.draw(JSON)
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
        opened = result_or_refusal(lambda: open_artifact(artifact, "prompts"))
        if opened is not None:  # other fields may differ, but the files are the original ones
            assert set(opened.files) == {"a.txt", "sub/b.txt"}
            json.dumps(opened.metadata(), allow_nan=False).encode()
            assert len(opened.digest) == 64
    finally:
        path.write_text(good, encoding="utf-8")


@FUZZ
@given(st.binary(max_size=300))
def test_random_bytes_as_manifest_are_refused(artifact: Path, content: bytes) -> None:
    (artifact / MANIFEST).write_bytes(content)
    assert result_or_refusal(lambda: open_artifact(artifact, "prompts")) is None


NAMES = [
    "../outside", "/etc/passwd", "sub/../../outside", "..", ".", "", "a//b", "./a.txt", "sub/", "..\\outside", "C:\\x", "C:x",
    "\\\\host\\share", "a\x00b", "a\nb", "\x1b[2J",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_unsafe_file_names_are_refused(artifact: Path, name: str) -> None:
    (artifact.parent / "outside").write_bytes(b"abc")
    content = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    content["files"][name] = content["files"]["a.txt"]
    (artifact / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match="do not trust this artifact"):
        open_artifact(artifact, "prompts")
    result_or_refusal(lambda: open_artifact(artifact, "prompts"))


@pytest.mark.parametrize("target", ["/etc/passwd", "/etc", "a.txt", "..", ".", "nowhere"])
@pytest.mark.parametrize("name", ["link", "sub/link", MANIFEST])
def test_symbolic_links_are_refused(artifact: Path, name: str, target: str) -> None:
    """Listed in the manifest or not, to a file or to a folder, out of the artifact or within it."""
    (artifact / name).unlink(missing_ok=True)
    (artifact / name).symlink_to(target)
    with pytest.raises(InputError, match="is a symbolic link|has no manifest"):
        open_artifact(artifact, "prompts")


def test_artifact_behind_a_symbolic_link_is_accepted(artifact: Path) -> None:
    (artifact.parent / "here").symlink_to(artifact)
    assert open_artifact(artifact.parent / "here", "prompts") == read_manifest(artifact)


def test_pipe_and_socket_are_refused_without_reading(artifact: Path) -> None:
    os.mkfifo(artifact / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe or a device"):
        open_artifact(artifact, "prompts")
    (artifact / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(artifact / "s"))
        with pytest.raises(InputError, match="s is a pipe or a device"):
            open_artifact(artifact, "prompts")


def test_pipe_instead_of_file_or_manifest_is_refused(artifact: Path) -> None:
    (artifact / "a.txt").unlink()
    os.mkfifo(artifact / "a.txt")
    with pytest.raises(InputError, match="a.txt is a pipe or a device"):
        open_artifact(artifact, "prompts")
    (artifact / MANIFEST).unlink()
    os.mkfifo(artifact / MANIFEST)
    with pytest.raises(InputError, match="has no manifest.json"):
        open_artifact(artifact, "prompts")


def test_huge_manifest_is_refused_quickly(artifact: Path) -> None:
    path = artifact / MANIFEST
    with path.open("r+b") as file:  # 10 GB, but sparse
        file.truncate(10 * 10**9)
    started = time.monotonic()
    with pytest.raises(InputError, match="longer than 16 MiB"):
        open_artifact(artifact, "prompts")
    entry = '"%d":{"sha256":"' + "0" * 64 + '","size":1}'
    files = ",".join(entry % number for number in range(150_000))
    assert len(files) < 16 * 2**20
    good = {"kind": "prompts", "schema_version": 1, "parents": {}, "facts": {}}
    good |= dict.fromkeys(
        ("tokenizer_digest", "chat_template_digest", "config_digest", "code_revision", "created_at"), ""
    )
    path.write_text(json.dumps(good)[:-1] + f', "files": {{{files}}}}}', encoding="utf-8")
    with pytest.raises(InputError, match="lacks 0, which its manifest lists"):
        open_artifact(artifact, "prompts")
    assert time.monotonic() - started < 60  # seconds on an idle machine


def test_duplicate_file_name_in_manifest_is_refused(artifact: Path) -> None:
    text = (artifact / MANIFEST).read_text(encoding="utf-8")
    (artifact / MANIFEST).write_text(text.replace('"sub/b.txt"', '"a.txt"'), encoding="utf-8")
    with pytest.raises(InputError, match="the key 'a.txt' is duplicated"):
        open_artifact(artifact, "prompts")


@pytest.mark.parametrize("digits", [19, 400])
def test_fact_of_more_than_64_bits_is_refused(artifact: Path, digits: int) -> None:
    text = (artifact / MANIFEST).read_text(encoding="utf-8")
    (artifact / MANIFEST).write_text(text.replace('"n": 1', '"n": ' + "9" * digits), encoding="utf-8")
    with pytest.raises(InputError, match="the number 999.* is too large"):
        open_artifact(artifact, "prompts")


def test_write_manifest_refuses_links(artifact: Path) -> None:
    shutil.rmtree(artifact / "sub")
    (artifact / "sub").symlink_to("/etc")
    with pytest.raises(InputError, match="sub is a symbolic link"):
        write_manifest(artifact, kind="prompts")
