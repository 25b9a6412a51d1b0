"""A model folder or a data file that lies in S3, as a copy on this machine."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError


@contextlib.contextmanager
def local_copy(uri: str, config: StorageConfig, log: Callable[[str], None] | None = None) -> Iterator[str]:
    """The path of a copy of s3://BUCKET/KEY (an object, or all under it), gone after the block. Anything else: uri itself.

    What the block says of the copy in an InputError it says of the URI.
    """
    if not uri.startswith("s3://"):
        yield uri
        return
    parent, _, name = uri.rstrip("/").rpartition("/")
    if parent in ("s3:", "s3:/"):
        raise InputError(f"{uri} is a whole bucket; write s3://BUCKET/PREFIX.")
    with tempfile.TemporaryDirectory(prefix="rlhf-s3-") as folder:
        target = Path(folder) / name
        download_prefix(open_store(parent, config, log), name, target)
        try:
            yield str(target)
        except InputError as error:
            raise InputError(str(error).replace(str(target), uri)) from error


def download_prefix(store: Store, key: str, target: Path) -> None:
    """Copy the object of this key to the file target, or all objects under it into the folder target.

    Raises InputError when there is neither, and for a key that would lie outside of the folder.
    """
    found = store.list(key)
    if not found:
        store.download(key, target)
        return
    for name in found:
        inside = PurePosixPath(name.removeprefix(f"{key}/"))
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or "\0" in name:
            raise InputError(f"{store.uri}/{name} names a place outside of its folder; do not trust this bucket.")
        store.download(name, target / inside)


def upload_folder(store: Store, folder: Path, key: str, *, last: str) -> None:
    """Copy a folder to a key that it replaces; the file called last comes last, so that without it the copy is incomplete."""
    store.delete(key)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    for name in sorted(names, key=lambda name: (name == last, name)):
        store.upload(folder / name, f"{key}/{name}")
