"""Temporary local copies of sources in S3."""

import contextlib
from collections.abc import Callable, Iterator

from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.copy import local_copy


@contextlib.contextmanager
def download_sources(
    data: DataConfig, storage: StorageConfig, log: Callable[[str], None] | None = None
) -> Iterator[DataConfig]:
    """Yield data with every s3:// path replaced by that of a local copy; a path used by two sources is downloaded once."""
    with contextlib.ExitStack() as stack:
        paths = {source.path: "" for source in data.keyed_sources().values()}
        for path in paths:
            paths[path] = stack.enter_context(local_copy(path, storage, log))
        yield data.with_paths(paths)
