"""What the stage trains on, as ids: pairs, or labeled answers with the mismatched ones that KTO compares them with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.dpo import DpoConfig
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import LabeledText, PreferencePair
from components.rlhf.data.token_files import PackedTexts, encode_all
from components.rlhf.data.tokenizer import EncodedText
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.text.errors import InputError

MAX_HELDOUT_PAIRS = 128  # that are measured; the standard error of the accuracy is then at most 4.4%
LABELED = "labeled"  # the split of labeled answers


@dataclass(frozen=True, kw_only=True)
class Examples:
    """N records: pairs as 2N texts (chosen, rejected, chosen, ...), or N labeled answers."""

    texts: PackedTexts
    labels: Sequence[bool] | None = None  # whether each answer is desirable; None for pairs

    @property
    def texts_per_record(self) -> int:
        return 2 if self.labels is None else 1

    def __len__(self) -> int:
        return len(self.texts) // self.texts_per_record

    def texts_of(self, records: Sequence[int]) -> list[int]:
        """The texts of these records: of pairs first all chosen ones, and then all rejected ones."""
        size = self.texts_per_record
        return [size * record + part for part in range(size) for record in records]

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each record."""
        size, tokens = self.texts_per_record, self.texts.num_tokens
        return [sum(tokens[size * record : size * record + size]) for record in range(len(self))]


class Mismatches(Sequence[EncodedText]):
    """The answers of a step's records, each after the prompt of another one, for every step in turn.

    As in TRL's KTOTrainer, the answers of a step are moved on by one record, so that they are the same answers; the answer to the only
    record of a step is that of the record before it.
    """

    def __init__(self, texts: PackedTexts, steps: Sequence[Sequence[int]], *, max_tokens: int) -> None:
        self._texts, self._max_tokens = texts, max_tokens
        order = [row for step in steps for row in step]
        self._pairs: list[tuple[int, int]] = []  # prompt and answer
        self._starts = [0]
        for step in steps:
            done = len(self._pairs)
            last = step[-1] if len(step) > 1 else order[done - 1]
            self._pairs += zip(step, (last, *step[:-1]), strict=True)
            self._starts.append(len(self._pairs))
        learned, total = texts.num_learned, texts.num_tokens
        rooms = [(total[a] - learned[a], learned[b]) for a, b in self._pairs]
        self.num_learned = [min(answer, max_tokens - prompt) for prompt, answer in rooms]
        self.num_tokens = [prompt + answer for (prompt, _), answer in zip(rooms, self.num_learned, strict=True)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> Any:
        prompt, answer = (self._texts[row] for row in self._pairs[index])
        return EncodedText(
            prompt_ids=prompt.prompt_ids,
            response_ids=answer.response_ids,
            response_mask=answer.response_mask,
            truncated=answer.truncated,
        ).cut(self._max_tokens)

    def of_step(self, step: int) -> range:
        """Those of a step, from 1."""
        return range(self._starts[step - 1], self._starts[step])


Texts = PackedTexts | Mismatches


def encode(
    records: Sequence[PreferencePair] | Sequence[LabeledText],
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    max_tokens: int,
    folder: Path | None,
    log: Callable[[str], None],
) -> Examples:
    """The ids of a split of the data set in folder; those that prepare_data has stored there, if they are the same."""
    texts = encode_all(records, tokenizer, max_tokens=max_tokens, folder=folder, split=split, log=log)
    labels = [record.is_desirable for record in records if isinstance(record, LabeledText)]
    return Examples(texts=texts, labels=labels or None)


def load_examples(
    config: DpoConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    context: TrainingContext,
) -> tuple[Examples, Examples | None]:
    """What the loss learns from, of the data set in folder, and its held-out pairs, if it has any. Raises InputError."""
    options = dict(folder=folder, max_tokens=max_tokens, log=context.progress.log)
    heldout = load_records(folder, "heldout", PreferencePair)[:MAX_HELDOUT_PAIRS]
    pairs = encode(heldout, tokenizer, split="heldout", **options) if heldout else None
    if config.is_paired:
        train = load_records(folder, "train", PreferencePair)
        if not train:
            raise InputError(
                f"{folder} has no pairs, which dpo.loss {config.loss} learns from; give pairs or several rated answers to each prompt "
                "(data.preferences), or set dpo.loss to kto for single labeled answers."
            )
        return encode(train, tokenizer, split="train", **options), pairs
    if not (folder / f"{LABELED}.jsonl").is_file():
        raise InputError(
            f"{folder} has no labeled answers, which dpo.loss kto learns from; set data.desirable_rating and run prepare_data again, or "
            "set dpo.loss to dpo, which learns from pairs."
        )
    labeled = load_records(folder, LABELED, LabeledText)
    if len(labeled) < 2:
        raise InputError(
            f"{folder} has {len(labeled)} labeled answers, and dpo.loss kto compares each with another one; give more of them."
        )
    return encode(labeled, tokenizer, split=LABELED, **options), pairs


def batch_of(texts: Sequence[EncodedText]) -> TokenBatch:
    return collate([t.prompt_ids for t in texts], [t.response_ids for t in texts], [t.response_mask for t in texts])
