"""Folders of code: what is packed, what is refused, and that a packed folder unpacks to itself."""

import base64
import io
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.artifacts.code import code_files, copy_code, digest_of_code, open_code, pack_code, unpack_code
from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.text.errors import InputError


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "code", {"mine.py": "x = 1\n", "package/__init__.py": "", "package/words.txt": "a\nb\n"})


def test_packed_folder_unpacks_to_itself(folder: Path, tmp_path: Path) -> None:
    unpack_code(pack_code(folder), tmp_path / "copy")
    copy_code(folder, tmp_path / "other")
    assert content(tmp_path / "copy") == content(tmp_path / "other") == content(folder)


NAMES = st.text("abc", min_size=1, max_size=3)


@given(st.dictionaries(NAMES, st.binary(max_size=50), min_size=1, max_size=5))
def test_any_files_survive(files: dict[str, bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary, "s"), Path(temporary, "t")
        source.mkdir()
        for name, data in files.items():
            (source / f"{name}.py").write_bytes(data)
        unpack_code(pack_code(source), target)
        assert content(target) == content(source)


def test_archive_depends_on_names_and_contents_alone(folder: Path, tmp_path: Path) -> None:
    first = pack_code(folder)
    twin = tmp_path / "twin"
    for name in sorted(content(folder), reverse=True):
        write(twin, {name: content(folder)[name].decode()})
    os.utime(twin / "mine.py", (1, 1))
    (twin / "mine.py").chmod(0o755)
    assert pack_code(twin) == first
    write(twin, {"mine.py": "x = 2\n"})
    assert pack_code(twin) != first


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".git/config",
        ".venv/a.py",
        "package/.netrc",
        "__pycache__/mine.cpython-311.pyc",
        "old.pyc",
        "a.egg-info/PKG-INFO",
    ],
)
def test_hidden_and_compiled_files_are_left_out(name: str, folder: Path) -> None:
    before = pack_code(folder)
    write(folder, {name: "SECRET=1"})
    assert pack_code(folder) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.pkl", "is a pickle"),
        ("package/a.PICKLE", "is a pickle"),
        ("b.joblib", "is a pickle"),
        ("id.pem", "looks like a key"),
        ("package/tls.key", "looks like a key"),
    ],
)
def test_pickles_and_keys_are_refused(name: str, message: str, folder: Path) -> None:
    write(folder, {name: "x"})
    with pytest.raises(InputError, match=message):
        code_files(folder)


@pytest.mark.parametrize("target", ["mine.py", "package", "/etc/passwd", "nowhere", ".."])
def test_links_are_refused_wherever_they_lead(target: str, folder: Path) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(InputError, match="link is a symbolic link; put a copy in its place"):
        pack_code(folder)


def test_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match="is a pipe or a device"):
        pack_code(folder)


def test_folder_without_module_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no Python module; correct code.path"):
        pack_code(write(tmp_path / "a", {"notes.txt": "x"}))
    with pytest.raises(InputError, match="is not a folder"):
        pack_code(tmp_path / "missing")


def test_too_much_is_refused(folder: Path) -> None:
    with (folder / "big.bin").open("wb") as file:
        file.truncate(64 * 2**20 + 1)  # sparse
    with pytest.raises(InputError, match="has 64 MiB, and code may have 64"):
        pack_code(folder)


# --- archives that were not made here ---


def archive(files: dict[str, str]) -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in files.items():
            file.writestr(name, text)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("name", ["../out.py", "/out.py", "a/../../out.py", "a\\..\\out.py"])
def test_archive_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="code.archive is not an archive of code"):
        unpack_code(archive({name: "x"}), tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("out.py"))


@pytest.mark.parametrize("text", ["", "not base64!", base64.b64encode(b"not a zip").decode()])
def test_other_text_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="code.archive is not an archive of code"):
        unpack_code(text, tmp_path)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_archive_or_refused(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary, pytest.raises(InputError):
        unpack_code(base64.b64encode(data).decode(), Path(temporary))


def test_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unpacks to more than 64 MiB"):
        unpack_code(archive({"a.py": "x" * (65 * 2**20)}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_archive_is_held_to_the_same_rules(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a pickle"):
        unpack_code(archive({"mine.py": "", "model.pkl": "x"}), tmp_path)


# --- the digest in the settings ---


def test_artifact_must_have_the_digest_of_the_settings(folder: Path, tmp_path: Path) -> None:
    digest = digest_of_code(folder)
    artifact = tmp_path / "artifact"
    copy_code(folder, artifact)
    write_manifest(artifact, kind="code")
    assert open_code(artifact, digest) == artifact
    (artifact / "mine.py").write_text("import os\n")
    write_manifest(artifact, kind="code")  # a valid artifact with other code
    with pytest.raises(InputError, match="is not the code of this run"):
        open_code(artifact, digest)
    assert open_code(artifact, "") == artifact  # code in S3
    assert open_code(None, digest) is None


@pytest.mark.parametrize("change", ["added.py", ".hidden.py", "package/mine.py"])
def test_added_files_change_the_digest(change: str, folder: Path, tmp_path: Path) -> None:
    digest = digest_of_code(folder)
    artifact = tmp_path / "artifact"
    copy_code(folder, artifact)
    write(artifact, {change: "x = 1\n"})
    write_manifest(artifact, kind="code")
    with pytest.raises(InputError, match="is not the code of this run"):
        open_code(artifact, digest)
