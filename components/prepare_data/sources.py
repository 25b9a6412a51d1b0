"""Data that lies in S3, brought here for as long as it is read."""

import contextlib
from collections.abc import Callable, Iterator

from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.copy import local_copy


@contextlib.contextmanager
def download_sources(
    data: DataConfig, storage: StorageConfig, log: Callable[[str], None] | None = None
) -> Iterator[DataConfig]:
    """The same settings with every s3:// path replaced by that of a local copy; a file that two sources name comes once."""
    with contextlib.ExitStack() as stack:
        local: dict[str, str] = {}
        changed = {}
        for name in ("demonstrations", "preferences", "prompts"):
            source = getattr(data, name)
            if source is not None:
                if source.path not in local:
                    local[source.path] = stack.enter_context(local_copy(source.path, storage, log))
                changed[name] = source.model_copy(update={"path": local[source.path]})
        yield data.model_copy(update=changed)
