"""Copies of files and folders from and to a store."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError


@contextlib.contextmanager
def local_copy(uri: str, config: StorageConfig, log: Callable[[str], None] | None = None) -> Iterator[str]:
    """Yield the path of a temporary copy of s3://BUCKET/KEY (an object or a prefix); any other uri is yielded as it is.

    In the messages of InputErrors from the block, the temporary path is replaced by the URI.
    """
    if not uri.startswith("s3://"):
        yield uri
        return
    parent, _, name = uri.rstrip("/").rpartition("/")
    if parent in ("s3:", "s3:/"):
        raise InputError(f"{uri} is a bucket without a key; write s3://BUCKET/PREFIX.")
    with tempfile.TemporaryDirectory(prefix="rlhf-s3-") as folder:
        target = Path(folder) / name
        download_prefix(open_store(parent, config, log), name, target)
        try:
            yield str(target)
        except InputError as error:
            raise InputError(str(error).replace(str(target), uri)) from error


def download_prefix(store: Store, key: str, target: Path) -> None:
    """Download the object at key to the file target, or all objects under key/ into the folder target.

    Raises InputError if neither exists, and for keys that lead out of the folder.
    """
    keys = store.list(key)
    if not keys:
        store.download(key, target)
        return
    for name in keys:
        relative = PurePosixPath(name.removeprefix(f"{key}/"))
        if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
            raise InputError(f"{store.uri}/{name} is a key that leads out of its folder; do not trust this bucket.")
        store.download(name, target / relative)


def upload_folder(store: Store, folder: Path, key: str, *, last: str) -> None:
    """Replace everything under key by a folder. The file named last is uploaded last and marks a complete upload."""
    store.delete(key)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    for name in sorted(names, key=lambda name: (name == last, name)):
        store.upload(folder / name, f"{key}/{name}")
