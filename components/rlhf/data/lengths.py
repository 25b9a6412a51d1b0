"""Drops records by their length in tokens, and counts them."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText, is_chat
from components.rlhf.data.tokenizer import encode_completion, encode_prompt

R = TypeVar("R", Demonstration, PreferencePair, Prompt, RatedText)


def drop_too_long(
    records: list[R], data: DataConfig, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]
) -> list[R]:
    """The records that fit into max_prompt_tokens and max_tokens; with over_length 'cut' long completions are kept.

    One of the max_tokens is reserved for the token that ends the response. Updates counts.
    """
    kept: list[R] = []
    for record in records:
        if not encode_completion(tokenizer, record.prompt):
            counts["dropped_no_tokens"] += 1
            continue
        prompt_length = len(encode_prompt(tokenizer, record.prompt, is_chat=is_chat(record)))
        if prompt_length > data.max_prompt_tokens:
            counts["dropped_long_prompt"] += 1
            continue
        max_completion_tokens = data.max_tokens - prompt_length - 1
        if data.over_length == "drop" and any(
            len(encode_completion(tokenizer, text)) > max_completion_tokens for text in _completions(record)
        ):
            counts["dropped_long_text"] += 1
            continue
        kept.append(record)
    counts["kept"] = len(kept)
    return kept


def longest_prompt(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of the longest prompt; 0 without prompts."""
    return max((len(encode_prompt(tokenizer, p.prompt, is_chat=is_chat(p))) for p in prompts), default=0)


def _completions(record: Demonstration | PreferencePair | Prompt | RatedText) -> list[str]:
    match record:
        case PreferencePair():
            return [record.chosen, record.rejected]
        case Demonstration() | RatedText():
            return [record.completion]
        case _:
            return []
