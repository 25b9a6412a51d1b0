"""Checks of local inputs before the first stage starts, so that a bad line is found before a model is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.rlhf.config.params import Params
from components.rlhf.config.prepare_data import DataSource
from components.rlhf.data.clean import clean
from components.rlhf.data.schemas import to_demonstration, to_pair, to_prompt
from components.rlhf.data.sources import read_rows
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError


class PlaceholderTokenizer:
    """Stands in for a tokenizer: this checks the structure of messages, prepare_data their rendering."""

    chat_template = "any"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def check_inputs(params: Params, *, is_on_cluster: Callable[[str], bool] = lambda source: False) -> None:
    """Raise InputError for a local model folder without tokenizer or config, or a local data file that prepare_data would reject.

    The stages that read them check hub ids, packages, S3 URIs, and the paths for which is_on_cluster is true.
    """
    for key, source in (
        ("model.source", params.model.source),
        ("sft.use", params.sft.use),
        ("reward_model.use", params.reward_model.use),
    ):
        if source and _is_local(source) and not is_on_cluster(source):
            _check_model(key, Path(source))
    converters: dict[str, Callable[..., Any]] = {
        "demonstrations": to_demonstration,
        "preferences": to_pair,
        "prompts": to_prompt,
    }
    for name, to_record in converters.items():
        source = getattr(params.data, name)
        if source is not None and _is_file(source) and not is_on_cluster(source.path):
            tokenizer = PlaceholderTokenizer()
            records = (to_record(location, row, tokenizer, "plain") for location, row in read_rows(source))
            clean(f"data.{name} ({source.path})", records)


def check_stores(params: Params) -> None:
    """Raise InputError if the S3 store of checkpoints or published models is unreachable or denies access."""
    for key in ("checkpoint_uri", "publish_uri"):
        uri: str | None = getattr(params.storage, key)
        if uri and uri.startswith("s3://"):
            try:
                open_store(uri, params.storage).read("anything", limit=10**9)
            except InputError as error:
                raise InputError(f"storage.{key}: {error}") from None


def _is_local(source: str) -> bool:
    return Path(source).exists() or source.startswith(("/", "./", "../", "~"))


def _is_file(source: DataSource) -> bool:
    if source.path.startswith("s3://"):
        return False
    return source.format in ("jsonl", "parquet") or (source.format == "auto" and Path(source.path).suffix != "")


def _check_model(key: str, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{key}: {folder} is not a folder; correct the path.")
    if not (folder / "config.json").is_file():
        raise InputError(f"{key}: {folder} has no config.json; it is not a model folder in the Hugging Face layout.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{key}: {folder} has no tokenizer (no tokenizer.json); save the model's tokenizer into it.")
