"""Where files lie that are not artifacts of KFP: a folder (a PVC is one) or an S3 bucket, behind one protocol.

Keys are posix paths relative to the store's URI. Nothing half-written is ever seen under its key.
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
        """Sizes in bytes of everything under a prefix, by key."""
        ...

    def read(self, key: str, *, limit: int) -> bytes | None:
        """A small object whole, or None if there is none. Raises InputError when it is longer than limit bytes."""
        ...

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write a small object whole; False, and nothing written, when it had to be absent and is there."""
        ...

    def upload(self, file: Path, key: str) -> None:
        """Copy a file of any size into the store."""
        ...

    def download(self, key: str, file: Path) -> None:
        """Copy an object of any size out of the store; its content is that of the upload, or an error is raised."""
        ...

    def delete(self, prefix: str) -> None:
        """Delete everything under a prefix."""
        ...


class FolderStore:
    """A folder of this machine, or a volume that is mounted into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder)

    def list(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        for path in sorted(self._resolve(prefix).rglob("*")):
            if path.is_file() and not path.name.startswith(".writing-"):
                found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return found

    def read(self, key: str, *, limit: int) -> bytes | None:
        path = self._resolve(key)
        try:
            # A link is not followed, and a pipe without a writer not waited for.
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            reason = "a link" if path.is_symlink() else error.strerror
            raise InputError(f"{path} cannot be read ({reason}); delete it, or correct its permissions.") from None
        try:
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise InputError(f"{path} is no file, as all of ours are; delete it.")
            with open(opened, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        finally:
            os.close(opened)
        if len(data) > limit:
            raise InputError(f"{self.folder / key} is longer than {limit} bytes, which nothing of ours is; delete it.")
        return data

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        draft = self._temporary_path(key)
        try:
            with draft.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            if only_if_absent:
                os.link(draft, self.folder / key)  # fails where the name is taken, on NFS too
            else:
                draft.replace(self.folder / key)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def upload(self, file: Path, key: str) -> None:
        draft = self._temporary_path(key)
        try:
            shutil.copyfile(file, draft)
            draft.replace(self.folder / key)
        finally:
            draft.unlink(missing_ok=True)

    def download(self, key: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".writing-{uuid.uuid4().hex}-{file.name}")
        try:
            shutil.copyfile(self.folder / key, draft)
            draft.replace(file)
        except FileNotFoundError as error:
            raise InputError(f"{self.folder / key} does not exist; correct the path.") from error
        finally:
            draft.unlink(missing_ok=True)

    def delete(self, prefix: str) -> None:
        target = self.folder / prefix
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def _resolve(self, key: str) -> Path:
        """Where a key lies. Raises InputError where a link leads out of the folder. The folder itself may be reached over links."""
        path = self.folder / key
        # Of a file that is a link the place counts: a write replaces the link, and a read refuses it.
        real = Path(os.path.realpath(path if path.is_dir() else path.parent))
        if not real.is_relative_to(os.path.realpath(self.folder)):
            raise InputError(f"{path} leads out of {self.folder} by a link; delete the link.")
        return path

    def _temporary_path(self, key: str) -> Path:
        target = self._resolve(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Threads share a process id, and so do the first processes of two containers on one volume.
        return target.with_name(f".writing-{uuid.uuid4().hex}-{target.name}")


def open_store(uri: str, config: StorageConfig | None = None, log: Callable[[str], None] | None = None) -> Store:
    """The store of s3://BUCKET/PREFIX, file://FOLDER or a folder. say is given lines about long transfers.

    Raises InputError for any other URI; whether S3 answers is seen when it is first used.
    """
    if uri.startswith("s3://"):
        from components.rlhf.storage.s3 import S3Store  # boto3 takes a while to import

        return S3Store(uri, config or StorageConfig(), log)
    if "://" in uri and not uri.startswith("file://"):
        raise InputError(f"{uri}: no such store; write s3://BUCKET/PREFIX or a folder.")
    return FolderStore(Path(uri.removeprefix("file://")))
