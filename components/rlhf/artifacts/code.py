"""The folder of the user's Python modules: what of it is used, and its form as text in settings."""

import base64
import binascii
import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from components.rlhf.artifacts.manifest import list_files, sha256_of
from components.rlhf.text.errors import InputError

MAX_BYTES = 64 * 2**20  # of all files; code is smaller, data and models belong elsewhere
PICKLES, KEYS = (".pkl", ".pickle", ".joblib"), (".pem", ".key", ".p12", ".pfx")
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file, so that the archive depends on names and contents alone
MODE = 0o644 << 16


def code_files(folder: Path) -> dict[str, Path]:
    """The files of a folder of code by their paths in it, without hidden and compiled ones.

    Raises InputError for a symbolic link, a pipe, a pickle or a key, if there is too much, and without a Python module or a YAML file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; set code.path to the folder of your Python modules.")
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_left_out(name))
        for name in [*folders, *sorted(names)]:
            path = Path(parent, name)
            if _is_left_out(name):
                continue
            if path.is_symlink():
                raise InputError(f"{path} is a symbolic link; put a copy in its place, because code is used elsewhere.")
            if path.is_dir():
                continue
            _require_plain(path)
            found[path.relative_to(folder).as_posix()] = path
    if not any(name.endswith((".py", ".yaml")) for name in found):  # of lm-evaluation-harness, whose tasks are YAML
        raise InputError(f"{folder} has no Python module; correct code.path.")
    size = sum(path.stat().st_size for path in found.values())
    if size > MAX_BYTES:
        raise InputError(
            f"{folder} has {size / 2**20:.0f} MiB, and code may have {MAX_BYTES // 2**20}; keep data and models elsewhere."
        )
    return dict(sorted(found.items()))


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__" or name.endswith((".pyc", ".egg-info"))


def _require_plain(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is a pipe or a device; remove it from the folder of code.")
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path} is a pickle, which can run anything when it is read; save its content as JSON.")
    if path.suffix.lower() in KEYS:
        raise InputError(f"{path} looks like a key, and would be copied with the code; move it out of the folder.")


def digest_of_code(folder: Path) -> str:
    """SHA-256 of the names and contents of the files of a folder of code."""
    return _digest_of(code_files(folder))


def _digest_of(files: Mapping[str, Path]) -> str:
    lines = "".join(f"{sha256_of(path)}  {name}\n" for name, path in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def open_code(folder: Path | None, digest: str) -> Path | None:
    """The folder of an artifact of code, as it is given.

    Raises InputError if it has another digest than the settings of the run: whoever can write to the store of artifacts could put other
    code into it. Without a digest, which code in S3 does not have, any is taken.
    """
    if folder is not None and digest and _digest_of(list_files(folder)) != digest:
        raise InputError(
            f"{folder} is not the code of this run (its digest is not code.digest of the settings); do not trust this artifact, or "
            "import the code again."
        )
    return folder


def pack_code(folder: Path) -> str:
    """The files of a folder of code as a ZIP archive in base64. Equal names and contents give an equal text."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, path in code_files(folder).items():
            entry = zipfile.ZipInfo(name, date_time=EPOCH)
            entry.external_attr, entry.compress_type, entry.create_system = MODE, zipfile.ZIP_DEFLATED, 3
            archive.writestr(entry, path.read_bytes(), compresslevel=9)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def unpack_code(text: str, target: Path) -> None:
    """Write the files of an archive of pack_code into a folder. Raises InputError for any other text."""
    try:
        with zipfile.ZipFile(io.BytesIO(base64.b64decode(text, validate=True))) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise InputError(
                    f"code.archive unpacks to more than {MAX_BYTES // 2**20} MiB; make it of a smaller folder."
                )
            for entry in entries:
                file = target / _plain_name(entry.filename)
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source:
                    file.write_bytes(source.read(entry.file_size))
    except (binascii.Error, zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"code.archive is not an archive of code ({error}); set code.path to the folder.") from None
    code_files(target)


def copy_code(folder: Path, target: Path) -> None:
    """Copy the files of a folder of code into another."""
    for name, path in code_files(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def _plain_name(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or {"..", "."} & set(path.parts) or "\\" in name or not name.isprintable():
        raise ValueError(f"it contains {name[:80]!a}")
    return name
