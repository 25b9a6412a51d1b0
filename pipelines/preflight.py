"""Looking at everything that lies on this machine before the first stage starts: a wrong line should not cost a model's loading."""

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


class AnyTemplate:
    """Stands in for a tokenizer: the form of messages is checked here, their rendering in prepare_data."""

    chat_template = "any"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def check_inputs(params: Params, *, elsewhere: Callable[[str], bool] = lambda source: False) -> None:
    """Raise InputError for a local model folder without tokenizer or config, or a local data file that prepare_data would refuse.

    Hub ids, packages and remote URIs are checked by the stages that fetch them, and so are the paths that elsewhere says are not
    of this machine.
    """
    for key, source in (
        ("model.source", params.model.source),
        ("sft.use", params.sft.use),
        ("reward_model.use", params.reward_model.use),
    ):
        if source and _looks_local(source) and not elsewhere(source):
            _check_model(key, Path(source))
    forms: dict[str, Callable[..., Any]] = {
        "demonstrations": to_demonstration,
        "preferences": to_pair,
        "prompts": to_prompt,
    }
    for name, to_record in forms.items():
        source = getattr(params.data, name)
        if source is not None and _is_file(source) and not elsewhere(source.path):
            rows = read_rows(source)
            clean(
                f"data.{name} ({source.path})", (to_record(place, row, AnyTemplate(), "plain") for place, row in rows)
            )


def check_stores(params: Params) -> None:
    """Raise InputError when the S3 of checkpoints or published models does not answer, or refuses: no stage should find it out later."""
    for key in ("checkpoint_uri", "publish_uri"):
        uri: str | None = getattr(params.storage, key)
        if uri and uri.startswith("s3://"):
            try:
                open_store(uri, params.storage).read("anything", limit=10**9)
            except InputError as error:
                raise InputError(f"storage.{key}: {error}") from None


def _looks_local(source: str) -> bool:
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
