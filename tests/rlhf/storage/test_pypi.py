import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from components.rlhf.storage import pypi
from components.rlhf.storage.pypi import cache_folder, fetch_package
from components.rlhf.text.errors import InputError

NAME = "tiny_carrier==1.0"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that pip is configured to use instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requirements that were downloaded; pip is replaced by a function that writes a file."""
    requirements: list[str] = []

    def download(requirement: str, folder: Path, *, source: bool) -> None:
        requirements.append(requirement)
        (folder / "carrier.whl").write_bytes(b"wheel")

    monkeypatch.setattr(pypi, "_download", download)
    return requirements


def make_wheel(folder: Path) -> Path:
    path = folder / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_carrier/model.gguf", "GGUF")
        wheel.writestr(
            "tiny_carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny_carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_carrier-1.0.dist-info/RECORD", "")
    return path


def test_pip_downloads_from_its_configured_index(index: Path, cache: Path) -> None:
    wheel = make_wheel(index)
    fetched = fetch_package(f"pypi:{NAME}")
    assert fetched.read_bytes() == wheel.read_bytes()
    assert fetched.parent == cache / "packages/tiny_carrier-1.0"
    wheel.unlink()  # only the cache has it
    assert fetch_package(f"pypi:{NAME}") == fetched
    assert [path.name for path in (cache / "packages").iterdir()] == ["tiny_carrier-1.0"]


def test_missing_package_is_refused(index: Path, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        fetch_package(f"pypi:{NAME}")
    message = str(caught.value)
    assert message.startswith(f"{NAME} could not be downloaded from the package index (ERROR: ")
    assert message.endswith("); check the network and pip's settings.") and "\n" not in message
    assert list((cache / "packages").iterdir()) == []  # the next attempt starts from the beginning


def test_second_call_uses_the_cache(downloads: list[str]) -> None:
    assert fetch_package(f"pypi:{NAME}") == fetch_package(f"pypi:{NAME}")
    assert downloads == [NAME]


def test_uri_without_version_is_refused(downloads: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        fetch_package("pypi:tiny_carrier")
    assert str(caught.value) == "pypi:tiny_carrier has no version; write pypi:NAME==VERSION."
    assert downloads == []


def test_known_package_with_the_right_digest_is_accepted(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, hashlib.sha256(b"wheel").hexdigest())
    assert fetch_package(f"pypi:{NAME}").read_bytes() == b"wheel"


def test_known_package_with_another_digest_is_refused(
    downloads: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, "0" * 64)
    file = cache / "packages/tiny_carrier-1.0/carrier.whl"
    message = f"{file} is not the expected {NAME} (sha256 differs); delete it and run again."
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            fetch_package(f"pypi:{NAME}")
        assert str(caught.value) == message
    assert downloads == [NAME]

    # Deleting the file, as the message advises, causes a new download.
    file.unlink()
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, hashlib.sha256(b"wheel").hexdigest())
    assert fetch_package(f"pypi:{NAME}") == file
    assert downloads == [NAME, NAME]


def test_file_of_a_faster_process_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = cache / "packages/tiny_carrier-1.0"

    def download(_requirement: str, folder: Path, *, source: bool) -> None:
        (folder / "carrier.whl").write_bytes(b"own")
        target.mkdir()
        (target / "carrier.whl").write_bytes(b"of the other process")

    monkeypatch.setattr(pypi, "_download", download)
    assert fetch_package(f"pypi:{NAME}").read_bytes() == b"of the other process"
    assert list(target.parent.iterdir()) == [target]


def test_cache_folder_comes_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.setenv("RLHF_CACHE_DIR", "")  # empty counts as unset
    assert cache_folder() == Path("/b/kfp-rlhf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/kfp-rlhf")


@pytest.mark.parametrize(
    "uri",
    [
        "pypi:../../../escaped==1.0", "pypi:/etc/x==1", "pypi:--index-url=http://evil.example==1", "pypi:-r/etc/passwd==1",
        "pypi:x==1;print", "pypi:x==1 --pre", "pypi:x==1\n-r y", "pypi:x @ http://evil.example/x.whl==1", "pypi:x[extra]==1",
        "pypi:x==../../y", "pypi:x==1,>0", "pypi:a b==1", "pypi:==1", "pypi:x==",
    ],
)  # fmt: skip
def test_malformed_requirements_are_refused(downloads: list[str], uri: str, cache: Path) -> None:
    with pytest.raises(InputError, match="is not of the form pypi:NAME==VERSION"):
        fetch_package(uri)
    assert downloads == [] and not cache.exists()


def make_sdist(folder: Path, ran: Path) -> Path:
    """An sdist whose build code creates the file ran."""
    path = folder / "tiny_carrier-1.0.tar.gz"
    files = {
        "tiny_carrier-1.0/setup.py": f"open({str(ran)!r}, 'w').close()\nimport setuptools; setuptools.setup()\n",
        "tiny_carrier-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: tiny_carrier\nVersion: 1.0\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def test_no_code_of_a_package_is_run(index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sdist(index, tmp_path / "ran")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "1")
    with pytest.raises(InputError, match="could not be downloaded"):  # where a wheel is expected
        fetch_package(f"pypi:{NAME}")
    with pytest.raises(InputError, match="downloading an sdist runs its code, which is allowed only for"):
        fetch_package(f"pypi:{NAME}", source=True)
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, "0" * 64)
    with pytest.raises(InputError, match="could not be downloaded"):  # under a known name with another digest
        fetch_package(f"pypi:{NAME}", source=True)
    assert not (tmp_path / "ran").exists()
