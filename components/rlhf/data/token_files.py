"""Ids of the texts of a split, computed once by prepare_data and read where training has the same tokenizer and settings.

SPLIT.tokens.safetensors is beside SPLIT.jsonl. A reader maps it into memory, which the processes of a machine share.
"""

import hashlib
import importlib.metadata
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from components.rlhf.data.records import PreferencePair
from components.rlhf.data.tokenizer import EncodedText, Record, chat_template_digest, encode_record, encoding_digest
from components.rlhf.text.errors import InputError

SCHEMA_VERSION = 1
NUM_PROBES = 8  # texts of a file that are encoded again, to compare
COLUMNS = (
    "lengths",
    "prompt_lengths",
    "num_runs",
    "truncated",
)  # of N texts; "ids" and "runs" are of all texts, joined


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedText:
    """An EncodedText in 4 bytes per token. runs are the lengths of the parts of the response: learned, not learned, learned, ..."""

    ids: "array[int]"  # prompt and response
    prompt_length: int
    runs: tuple[int, ...]
    truncated: bool


def pack(text: EncodedText) -> PackedText:
    runs = [sum(1 for _ in run) for _, run in groupby(text.response_mask)]
    return PackedText(
        ids=array("i", [*text.prompt_ids, *text.response_ids]),
        prompt_length=len(text.prompt_ids),
        runs=(0, *runs) if text.response_mask[:1] == [False] else tuple(runs),
        truncated=text.truncated,
    )


class PackedTexts(Sequence[EncodedText]):
    """Encoded texts whose ids are read when a text is taken, and whose lengths are known without that."""

    def __init__(self, values: dict[str, Any], size: int) -> None:
        """The first `size` texts of the arrays that _arrays makes. Raises ValueError when their lengths contradict each other."""
        lengths, prompts, num_runs, truncated = (values[name] for name in COLUMNS)
        self._ids, self._runs = values["ids"], values["runs"]
        self._starts, self._run_starts = _starts(lengths), _starts(num_runs)
        of_text = np.repeat(np.arange(len(num_runs)), num_runs)
        is_learned = (np.arange(len(of_text)) - self._run_starts[of_text]) % 2 == 0
        responses = np.bincount(of_text, self._runs[: len(of_text)], len(num_runs))
        if any(part.size and part.min() < 0 for part in (lengths, prompts, num_runs, self._runs)):
            raise ValueError("a length is negative")
        if len({len(values[name]) for name in COLUMNS}) > 1 or len(lengths) < size:
            raise ValueError("there are too few texts")
        if len(of_text) != len(self._runs) or not np.array_equal(prompts + responses, lengths):
            raise ValueError("the lengths contradict each other")
        learned = np.bincount(of_text, self._runs * is_learned, len(num_runs))
        self._prompts: list[int] = prompts[:size].tolist()
        self._truncated: list[bool] = truncated[:size].tolist()
        self.num_tokens: list[int] = lengths[:size].tolist()
        self.num_learned: list[int] = learned[:size].astype(int).tolist()

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        ids: list[int] = self._ids[self._starts[row] : self._starts[row + 1]].tolist()
        runs = self._runs[self._run_starts[row] : self._run_starts[row + 1]].tolist()
        return EncodedText(
            prompt_ids=ids[: self._prompts[row]],
            response_ids=ids[self._prompts[row] :],
            response_mask=[number % 2 == 0 for number, run in enumerate(runs) for _ in range(run)],
            truncated=self._truncated[row],
        )


def _starts(lengths: Any) -> Any:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def save_tokens(
    folder: Path, split: str, texts: Sequence[PackedText], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> None:
    """Write the ids of all texts of a split, whose SPLIT.jsonl exists: of pairs chosen, rejected, chosen, rejected, ..."""
    key = _key(folder, split, tokenizer, max_tokens)
    if key is not None:
        # One entry, because safetensors writes several in any order.
        save_file(_arrays(texts), _path(folder, split), metadata={"key": json.dumps(key, sort_keys=True)})


def encode_all(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    folder: Path | None,
    split: str,
    log: Callable[[str], None],
) -> PackedTexts:
    """encode_record of each of the records, the first ones of a split of the data set in folder.

    The ids are those of prepare_data if they were made with the same tokenizer and settings. Raises InputError if their file is
    damaged.
    """
    if folder is not None and _path(folder, split).is_file():
        stored = _read(folder, split, records, tokenizer, max_tokens, log)
        if stored is not None:
            return stored
    texts = [pack(text) for record in records for text in encode_record(record, tokenizer, max_tokens=max_tokens)]
    return PackedTexts(_arrays(texts), len(texts))


def _read(
    folder: Path,
    split: str,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    log: Callable[[str], None],
) -> PackedTexts | None:
    """The stored texts of the records; None if they depend on something that is different here."""
    path, per_record = _path(folder, split), 2 if records and isinstance(records[0], PreferencePair) else 1
    try:
        file: Any = safe_open(path, framework="np")
        stored_key = cast(dict[str, Any], json.loads((file.metadata() or {})["key"]))
        key = _key(folder, split, tokenizer, max_tokens) or {"tokenizer": None}
        if different := sorted(name for name in key | stored_key if key.get(name) != stored_key.get(name, "")):
            log(f"tokenizing {split} again: the stored ids do not match in {', '.join(different)}")
            return None
        values = {name: file.get_tensor(name) for name in (*COLUMNS, "runs")} | {"ids": file.get_slice("ids")}
        if values["ids"].get_shape() != [values["lengths"].sum()] or values["ids"].get_dtype() != "I32":
            raise ValueError("the ids do not have the lengths")
        found = PackedTexts(values, len(records) * per_record)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a valid file of token ids ({error}); run prepare_data again.") from None
    for number in {(len(records) - 1) * probe // (NUM_PROBES - 1) for probe in range(NUM_PROBES)} if records else ():
        texts = encode_record(records[number], tokenizer, max_tokens=max_tokens)
        if found[number * per_record : (number + 1) * per_record] != texts:
            log(f"tokenizing {split} again: the stored ids of record {number} are not those of its text")
            return None
    return found


def _key(folder: Path, split: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> dict[str, Any] | None:
    """Everything that the ids depend on; None if that cannot be known."""
    digest = encoding_digest(tokenizer)
    if digest is None:
        return None
    with (folder / f"{split}.jsonl").open("rb") as file:
        records = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "schema": SCHEMA_VERSION,
        "tokenizer": digest,
        "chat_template": chat_template_digest(tokenizer),
        "max_tokens": max_tokens,
        "records": records,
        **{f"version of {name}": importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
    }


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.tokens.safetensors"


def _arrays(texts: Sequence[PackedText]) -> dict[str, Any]:
    return {
        "lengths": np.array([len(text.ids) for text in texts], dtype=np.int32),
        "prompt_lengths": np.array([text.prompt_length for text in texts], dtype=np.int32),
        "num_runs": np.array([len(text.runs) for text in texts], dtype=np.int32),
        "truncated": np.array([text.truncated for text in texts], dtype=np.bool_),
        "runs": np.array([run for text in texts for run in text.runs], dtype=np.int32),
        "ids": np.concatenate([np.zeros(0, dtype=np.int32), *(np.asarray(text.ids) for text in texts)]),
    }
