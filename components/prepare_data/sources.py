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
        local_paths: dict[str, str] = {}
        local_sources = {}
        for name in ("demonstrations", "preferences", "prompts"):
            source = getattr(data, name)
            if source is not None:
                if source.path not in local_paths:
                    local_paths[source.path] = stack.enter_context(local_copy(source.path, storage, log))
                local_sources[name] = source.model_copy(update={"path": local_paths[source.path]})
        yield data.model_copy(update=local_sources)
