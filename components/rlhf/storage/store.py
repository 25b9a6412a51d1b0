"""Storage of files that are not KFP artifacts: one protocol for folders (such as a PVC) and S3 buckets.

Keys are posix paths relative to the store's URI. Writes are atomic.
"""

import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from components.rlhf.config.storage import StorageConfig
from components.rlhf.text.errors import InputError


class Store(Protocol):
    uri: str

    def list(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes of all objects under prefix/, by key."""

    def read(self, key: str, *, limit: int) -> bytes | None:
        """Read a small object; None if it does not exist. Raises InputError if it is longer than limit bytes."""

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write a small object. With only_if_absent, return False without writing if it exists."""

    def upload(self, file: Path, key: str) -> None:
        """Upload a file of any size."""

    def download(self, key: str, file: Path) -> None:
        """Download an object of any size. Raises InputError if it does not exist or differs from what was uploaded."""

    def delete(self, prefix: str) -> None:
        """Delete the object at prefix and all objects under prefix/. Raises ValueError for an empty prefix, the whole store."""


class FolderStore:
    """A local folder or a mounted volume."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder)

    def list(self, prefix: str = "") -> dict[str, int]:
        return {
            path.relative_to(self.folder).as_posix(): path.stat().st_size
            for path in sorted(self._resolve(prefix).rglob("*"))
            if path.is_file() and not path.name.startswith(".writing-")
        }

    def read(self, key: str, *, limit: int) -> bytes | None:
        path = self._resolve(key)
        try:
            # Does not follow a symbolic link, and does not block on a pipe.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            reason = "a symbolic link" if path.is_symlink() else error.strerror
            raise InputError(f"{path} cannot be read ({reason}); delete it, or correct its permissions.") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{path} is not a regular file; delete it.")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        finally:
            os.close(descriptor)
        if len(data) > limit:
            raise InputError(f"{path} is longer than {limit} bytes; delete it.")
        return data

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        temporary = self._temporary_path(key)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            if only_if_absent:
                os.link(temporary, self.folder / key)  # fails if the name exists, also on NFS
            else:
                temporary.replace(self.folder / key)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def upload(self, file: Path, key: str) -> None:
        _copy_atomically(file, self._temporary_path(key), self.folder / key)

    def download(self, key: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            _copy_atomically(self.folder / key, _temporary_name(file), file)
        except FileNotFoundError as error:
            raise InputError(f"{self.folder / key} does not exist; correct the path.") from error

    def delete(self, prefix: str) -> None:
        require_prefix(prefix)
        target = self._resolve(prefix)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def _resolve(self, key: str) -> Path:
        """The path of a key. Raises InputError if a symbolic link below the folder leads out of it."""
        path = self.folder / key
        # If the file itself is a link, only its location matters: a write replaces the link, and a read rejects it.
        real = Path(os.path.realpath(path if path.is_dir() else path.parent))
        if not real.is_relative_to(os.path.realpath(self.folder)):
            raise InputError(f"{path} leads out of {self.folder} through a symbolic link; delete the link.")
        return path

    def _temporary_path(self, key: str) -> Path:
        target = self._resolve(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        return _temporary_name(target)


def require_prefix(prefix: str) -> None:
    """Raise ValueError for a prefix that stands for the whole store, or leads out of it."""
    parts = [part for part in prefix.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ValueError(f"{prefix!r} is not a prefix that can be deleted")


def _temporary_name(target: Path) -> Path:
    # A process id is not unique: threads share it, and so do the first processes of two containers on one volume.
    return target.with_name(f".writing-{uuid.uuid4().hex}-{target.name}")


def _copy_atomically(source: Path, temporary: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def open_store(uri: str, config: StorageConfig | None = None, log: Callable[[str], None] | None = None) -> Store:
    """Open the store of s3://BUCKET/PREFIX, file://FOLDER or a folder. log receives progress lines of long transfers.

    Raises InputError for any other URI. An S3 server is contacted on first use only.
    """
    if uri.startswith("s3://"):
        from components.rlhf.storage.s3 import S3Store  # boto3 is slow to import

        return S3Store(uri, config or StorageConfig(), log)
    if "://" in uri and not uri.startswith("file://"):
        raise InputError(f"{uri} is not a supported store; write s3://BUCKET/PREFIX or a folder.")
    return FolderStore(Path(uri.removeprefix("file://")))
