from typing import Any

import pytest

from components.rlhf.config.prepare_data import DataConfig, DataSource
from components.rlhf.data.examples import Unusable
from components.rlhf.data.lengths import Lengths, fit_into_limits
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText, Turn
from tests.support.tiny_model import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()  # one token a character
SOURCE = DataSource(path="x.jsonl")
LONG_TEXT, LONG_PROMPT = "text longer than max_tokens", "prompt longer than max_prompt_tokens"


def fit(record: Any, **changes: Any) -> Lengths:
    data = DataConfig(preferences=SOURCE, prompts=SOURCE, max_prompt_tokens=4, max_tokens=10, **changes)
    return fit_into_limits(record, data, TOKENIZER)[0]


def reason(record: Any, **changes: Any) -> str:
    with pytest.raises(Unusable) as caught:
        fit(record, **changes)
    return caught.value.reason


def demonstration(*texts: str) -> Demonstration:
    turns = zip(texts[::2], texts[1::2], strict=True)
    return Demonstration(turns=tuple(Turn(context=context, answer=answer) for context, answer in turns))


def pair(chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt="1234", chosen=chosen, rejected=rejected)


def test_prompt_at_the_limit_is_kept() -> None:
    assert fit(Prompt(prompt="1234")) == Lengths(prompt=4, text=4)
    assert reason(Prompt(prompt="12345")) == LONG_PROMPT


def test_reason_names_the_setting_and_the_length() -> None:
    with pytest.raises(Unusable, match=r"its prompt has 5 tokens, and data\.max_prompt_tokens is 4"):
        fit(Prompt(prompt="12345"))
    with pytest.raises(Unusable, match=r"its text has 11 tokens, and data\.max_tokens is 10"):
        fit(pair("123456", "1"))


def test_prompt_without_tokens_is_dropped() -> None:
    assert reason(Prompt(prompt="")) == "prompt without tokens"


# 4 tokens of the prompt, 5 of the completion and EOS are 10.
@pytest.mark.parametrize(
    ("fits", "too_long"),
    [
        (demonstration("1234", "12345"), demonstration("1234", "123456")),
        # 1 + (2 + EOS) + 2 + (3 + EOS) = 10: every answer has its own end
        (demonstration("1", "12", "34", "123"), demonstration("1", "12", "34", "1234")),
        (
            RatedText(prompt="1", completion="12345678", rating=0),
            RatedText(prompt="1", completion="123456789", rating=0),
        ),
        (pair("12345", "1234"), pair("1", "123456")),
        (pair("12345", "1"), pair("123456", "1")),
    ],
)
def test_one_token_is_for_the_end(fits: Any, too_long: Any) -> None:
    assert fit(fits) == Lengths(prompt=len(fits.prompt), text=10)
    assert reason(too_long) == LONG_TEXT
    assert fit(too_long, over_length="cut") == Lengths(prompt=len(fits.prompt), text=10, is_cut=True)


def test_over_length_cut_does_not_apply_to_prompts() -> None:
    assert reason(demonstration("12345", "1"), over_length="cut") == LONG_PROMPT


def test_pair_that_is_equal_after_cutting_is_dropped() -> None:
    equal, different = pair("123456a", "123456b"), pair("12345a", "12345b")
    assert reason(equal, over_length="cut") == "equal answers after cutting"
    assert fit(different, over_length="cut").is_cut


def test_pair_of_which_one_is_a_prefix_of_the_other_differs_by_its_end() -> None:
    assert not fit(pair("12345", "1234"), over_length="cut").is_cut
    assert fit(pair("12345", "123456"), over_length="cut").is_cut  # 12345 and EOS against 123456
