from collections import Counter
from typing import Any

import pytest

from components.rlhf.config.prepare_data import DataConfig, DataSource
from components.rlhf.data.lengths import drop_too_long
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText
from tests.support.tiny_model import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()  # one token a character
SOURCE = DataSource(path="x.jsonl")


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(preferences=SOURCE, prompts=SOURCE, max_prompt_tokens=4, max_tokens=10, **changes)


def drop(record: Any, **changes: Any) -> tuple[bool, Counter[str]]:
    """Whether the record is kept, and the counts."""
    counts: Counter[str] = Counter(read=1, kept=1)
    return bool(drop_too_long([record], data_config(**changes), TOKENIZER, counts)), counts


def test_prompt_at_the_limit_is_kept() -> None:
    assert drop(Prompt(prompt="1234")) == (True, Counter(read=1, kept=1))
    assert drop(Prompt(prompt="12345")) == (False, Counter(read=1, kept=0, dropped_long_prompt=1))


def test_prompt_without_tokens_is_dropped() -> None:
    assert drop(Prompt(prompt="")) == (False, Counter(read=1, kept=0, dropped_no_tokens=1))


# 4 tokens of the prompt, 5 of the completion and EOS are 10.
@pytest.mark.parametrize(
    ("fits", "too_long"),
    [
        (Demonstration(prompt="1234", completion="12345"), Demonstration(prompt="1234", completion="123456")),
        (
            RatedText(prompt="1", completion="12345678", rating=0),
            RatedText(prompt="1", completion="123456789", rating=0),
        ),
        (
            PreferencePair(prompt="1234", chosen="12345", rejected="12345"),
            PreferencePair(prompt="1234", chosen="1", rejected="123456"),
        ),
        (
            PreferencePair(prompt="1234", chosen="12345", rejected="1"),
            PreferencePair(prompt="1234", chosen="123456", rejected="1"),
        ),
    ],
)
def test_one_token_is_reserved_for_eos(fits: Any, too_long: Any) -> None:
    assert drop(fits) == (True, Counter(read=1, kept=1))
    assert drop(too_long) == (False, Counter(read=1, kept=0, dropped_long_text=1))
    assert drop(too_long, over_length="cut") == (True, Counter(read=1, kept=1))


def test_over_length_cut_does_not_apply_to_prompts() -> None:
    assert drop(Demonstration(prompt="12345", completion="1"), over_length="cut")[0] is False


def test_order_is_kept_and_counts_are_updated() -> None:
    counts = Counter(read=5, kept=4, dropped_empty=1)
    records = [Prompt(prompt=text) for text in ("b", "12345", "a", "67890")]
    assert drop_too_long(records, data_config(), TOKENIZER, counts) == [records[0], records[2]]
    assert counts == {"read": 5, "kept": 2, "dropped_empty": 1, "dropped_long_prompt": 2}
