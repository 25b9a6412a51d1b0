"""Special tokens, ends of responses and chat templates of well-known model families."""

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from components.rlhf.data.chat import render_chat, turn_end_id, without_opening
from components.rlhf.data.records import Message
from components.rlhf.data.tokenizer import (
    decode_response,
    encode_prompt,
    encode_text,
    response_end_id,
    same_ids,
    special_prefix,
    stop_ids_of,
    tokenizer_digest,
)
from tests.support.chat_tokenizers import FAMILIES, TURN_ENDS, make_tokenizer
from tests.support.tiny_model import make_tiny_tokenizer

USER, ANSWER = Message(role="user", content="Hi"), Message(role="assistant", content="Hello")
CHAT_FAMILIES = [family for family in FAMILIES if family != "no template"]


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_response_in_a_chat_ends_with_the_token_that_closes_its_turn(family: str) -> None:
    tokenizer = make_tokenizer(family)
    end = tokenizer.convert_tokens_to_ids(TURN_ENDS[family])
    assert response_end_id(tokenizer, is_chat=True) == end
    assert response_end_id(tokenizer, is_chat=False) == tokenizer.eos_token_id
    assert encode_text(tokenizer, "x", "y", max_tokens=9, is_chat=True).response_ids[-1] == end
    assert encode_text(tokenizer, "x", "y", max_tokens=9, is_chat=False).response_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_stops_at_every_token_that_training_ends_a_response_with(family: str) -> None:
    tokenizer = make_tokenizer(family)
    stops = stop_ids_of(tokenizer, [7])
    assert {response_end_id(tokenizer, is_chat=is_chat) for is_chat in (True, False)} | {7} == set(stops)
    assert stops == sorted(set(stops))


def test_template_without_a_token_of_its_own_ends_a_turn_with_eos() -> None:
    tokenizer = make_tiny_tokenizer()  # <user>..., all plain text
    assert turn_end_id(tokenizer) is None
    assert response_end_id(tokenizer, is_chat=True) == tokenizer.eos_token_id
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert turn_end_id(tokenizer) is None


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_prompt_begins_as_tokenizer_of_the_text_does_and_has_no_end(family: str, adds_eos: bool) -> None:
    tokenizer = make_tokenizer(family, adds_eos=adds_eos)
    ids = tokenizer("A text")["input_ids"]
    expected = ids[:-1] if adds_eos else ids
    assert encode_prompt(tokenizer, "A text") == expected
    encoded = encode_text(tokenizer, "A text", " goes on", max_tokens=99)
    assert encoded.prompt_ids == expected
    whole = [*encoded.prompt_ids, *encoded.response_ids]
    assert whole == [
        *special_prefix(tokenizer),
        *tokenizer("A text goes on", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert whole.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("family", ["llama 3", "gemma", "llama 2", "no template"])
def test_bos_is_added_once(family: str) -> None:
    tokenizer = make_tokenizer(family)
    written = encode_prompt(tokenizer, f"{tokenizer.bos_token}A text")
    assert written == encode_prompt(tokenizer, "A text")
    assert written.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_rendered_chat_gets_no_special_tokens(family: str) -> None:
    tokenizer = make_tokenizer(family)
    text = render_chat(tokenizer, [USER])
    assert encode_prompt(tokenizer, text, is_chat=True) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, text, is_chat=True).count(tokenizer.bos_token_id) <= 1


@given(text=st.text(min_size=1, max_size=40), family=st.sampled_from(sorted(FAMILIES)), adds_eos=st.booleans())
def test_any_plain_text_has_the_ids_of_tokenizer_of_the_text(text: str, family: str, adds_eos: bool) -> None:
    tokenizer = TOKENIZERS[family, adds_eos]
    ids = tokenizer(text)["input_ids"]
    assert encode_prompt(tokenizer, text) == (ids[:-1] if adds_eos else ids)


TOKENIZERS = {
    (family, adds_eos): make_tokenizer(family, adds_eos=adds_eos) for family in FAMILIES for adds_eos in (False, True)
}


# --- templates ---


def test_date_in_a_template_is_the_setting_and_not_the_day() -> None:
    tokenizer = make_tokenizer("llama 3")
    date = datetime.date(2024, 7, 26)
    assert "Today Date: 26 Jul 2024" in render_chat(tokenizer, [USER], date=date)
    assert "Today Date: 01 Jan 2025" in render_chat(tokenizer, [USER])


OPENED = [
    # rendered prompt, completion, what the model has to learn after the prompt
    ("<|Assistant|><think>\n", "<think>\nBecause.</think>Yes", "Because.</think>Yes"),
    ("<|Assistant|><think>\n", "<think>Because.</think>Yes", "Because.</think>Yes"),
    ("<|Assistant|><think>\n", "\n<think>\n\nBecause", "\nBecause"),
    ("<|Assistant|>", "<think>Because.</think>Yes", "<think>Because.</think>Yes"),
    ("<|Assistant|><think>\n", "Yes", "Yes"),
    ("<|im_start|>assistant\n", "<|im_start|>assistant\nYes", "Yes"),
    ("[INST] Hi [/INST]", " Hello", " Hello"),
    ("[INST] Hi [/INST]", "[/INST] Hello", " Hello"),
    ("a < b <", "< c", " c"),
    ("", "<think>", "<think>"),
    ("<think>", "", ""),
]


@pytest.mark.parametrize(("prompt", "completion", "expected"), OPENED)
def test_completion_does_not_open_again_what_the_prompt_has_opened(prompt: str, completion: str, expected: str) -> None:
    assert without_opening(prompt, completion) == expected


# --- identity ---


def test_pad_template_and_special_tokens_around_a_text_do_not_change_its_ids() -> None:
    first, second = make_tokenizer("llama 2"), make_tokenizer("llama 2", adds_eos=True)
    second.pad_token = "<unk>"
    second.chat_template = "{{ messages }}"
    assert same_ids(first, second)
    assert tokenizer_digest(first) != tokenizer_digest(second)  # one of them appends EOS
    assert not same_ids(first, make_tokenizer("gemma"))
    more = make_tokenizer("llama 2")
    more.add_tokens(["zebra"])
    assert not same_ids(first, more)


def sentencepiece_like() -> Any:
    """A tokenizer whose words begin with a space that is lost when a text is decoded alone, as SentencePiece's."""
    vocabulary = {"<eos>": 0, "\u2581The": 1, "\u2581film": 2, "\u2581was": 3, "\u2581good": 4, "<unk>": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_text_of_a_response_begins_with_its_space() -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer.decode([3, 4]) == "was good"
    assert decode_response(tokenizer, [1, 2], [3, 4, 0]) == " was good"
    assert decode_response(TOKENIZERS["qwen", False], [65], [66]) == TOKENIZERS["qwen", False].decode([66])
