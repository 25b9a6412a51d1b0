"""Data that lies in S3, brought here for as long as it is read."""

import contextlib
from collections.abc import Callable, Iterator

from components.rlhf.config.data import DataSettings
from components.rlhf.config.storage import StorageSettings
from components.rlhf.edges.fetch import local_copy


@contextlib.contextmanager
def local_sources(
    data: DataSettings, storage: StorageSettings, say: Callable[[str], None] | None = None
) -> Iterator[DataSettings]:
    """The same settings with every s3:// path replaced by that of a local copy; a file that two sources name comes once."""
    with contextlib.ExitStack() as stack:
        local: dict[str, str] = {}
        changed = {}
        for name in ("demonstrations", "preferences", "prompts"):
            source = getattr(data, name)
            if source is not None:
                if source.path not in local:
                    local[source.path] = stack.enter_context(local_copy(source.path, storage, say))
                changed[name] = source.model_copy(update={"path": local[source.path]})
        yield data.model_copy(update=changed)
