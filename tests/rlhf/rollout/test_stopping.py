"""Stop strings in the engine hf, and in the text that both engines look for them in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.stopping import ResponseText, require_reachable_stops
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_model, make_tiny_tokenizer
from tests.support.wordy_tokenizer import SIZE, make_wordy_tokenizer, use_wordy_tokenizer

TOKENIZER = make_wordy_tokenizer()
IDS = {TOKENIZER.decode([number]): number for number in range(SIZE)}
FACE = [number for number in range(SIZE) if TOKENIZER.convert_ids_to_tokens(number) in ("ðŁ", "ĺĢ")]
PROMPT = [IDS[c] for c in "an END"]


def run(tokens: list[Any], *stops: str, min_new_tokens: int = 0) -> tuple[int, str, bool]:
    """Number of tokens until a stop string ends them, the text, and whether one did. tokens are texts or ids."""
    sampling = SamplingConfig(stop=stops, min_new_tokens=min_new_tokens)
    text = ResponseText(TOKENIZER, PROMPT, sampling)
    for number, token in enumerate(tokens, start=1):
        if text.append(IDS[token] if isinstance(token, str) else token):
            return number, text.text, text.stopped
    return len(tokens), text.text, text.stopped


@pytest.mark.parametrize(
    ("tokens", "stops", "expected"),
    [
        (["a", "\n", "\n", "b"], ["\n\n"], (3, "a", True)),  # over two tokens
        (["a", "E", "N", "D", "b"], ["END"], (4, "a", True)),  # over three
        (["a", "a\n", "\nb", "c"], ["\n\n"], (3, "aa", True)),  # over two with other text on both sides
        (["c", "xENDy", "d"], ["END"], (2, "cx", True)),  # inside one token with text after it
        (["c", "\n\n", "d"], ["\n\n"], (2, "c", True)),
        (["c", "the END of"], ["of", "END", "the"], (2, "c", True)),  # the one that is complete first
        (["c", "the END of"], ["of", "END of", "the END of"], (2, "cthe END ", True)),  # complete together: the first
        (["END", "END"], ["END"], (1, "", True)),
        (["E", "N", "d"], ["END"], (3, "ENd", False)),
        (["Dog"], ["ENDog", " ENDog"], (1, "Dog", False)),  # begins in the prompt
        (["n", *FACE, "d"], ["😀"], (3, "n", True)),  # a character of two tokens
        (["n", "é", *FACE], ["é😀"], (4, "n", True)),
        (["日本", "日本"], ["本日"], (2, "日", True)),
    ],
)
def test_stop_string_ends_the_text_before_it_and_keeps_the_token_that_completes_it(
    tokens: list[Any], stops: list[str], expected: tuple[int, str, bool]
) -> None:
    assert run(tokens, *stops) == expected


def test_stop_string_of_the_prompt_does_not_count() -> None:
    assert run(["a", "b"], "END") == (2, "ab", False)
    assert run(["a", "END"], "END") == (2, "a", True)


def test_stop_string_counts_after_min_new_tokens() -> None:
    assert run(["END", "a", "END"], "END", min_new_tokens=1) == (3, "ENDa", True)
    assert run(["E", "N", "D"], "END", min_new_tokens=2) == (3, "", True)  # it is complete in the third token
    assert run(["END", "a", "b"], "END", min_new_tokens=2) == (3, "ENDab", False)


def slow_stop(tokens: list[int], stops: list[str]) -> tuple[int, str] | None:
    """The number of tokens and the text before the stop string, by decoding everything after every token."""
    for number in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:number])
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        if ends:
            return number, text[: min(ends, key=lambda bounds: bounds[0])[1]]
    return None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([IDS[t] for t in ("a", "b", "\n", "\n\n", "ab", "b\n\nc", "END", "EN", "Dog", "é")]),
        max_size=12,
    ),
    st.lists(st.sampled_from(["\n", "\n\n", "b\n", "END", "ND", "Dog", "NDo", "é", "abab"]), min_size=1, max_size=4),
)
def test_any_tokens_stop_where_a_slow_version_does(tokens: list[int], stops: list[str]) -> None:
    expected = slow_stop(tokens, stops)
    number, text, stopped = run(tokens, *stops)
    assert stopped == (expected is not None)
    assert (number, text) == (expected or (len(tokens), TOKENIZER.decode(tokens)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 256), max_size=20))
def test_bytes_that_are_no_text_are_no_crash(tokens: list[int]) -> None:
    text = ResponseText(make_tiny_tokenizer(), [5], SamplingConfig(stop=("never there",)))
    assert not any(text.append(token) for token in tokens)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> HfRolloutEngine:
    folder = use_wordy_tokenizer(make_tiny_model(tmp_path_factory.mktemp("wordy") / "model", seed=0))
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    return HfRolloutEngine(lm, load_tokenizer(folder), stop_ids=(0,))


def generate(engine: HfRolloutEngine, *stops: str, **how: Any) -> list[Completion]:
    settings = SamplingConfig(**({"max_new_tokens": 40, "batch_size": 8, "stop": stops} | how))
    return engine.generate([Prompt(prompt=text) for text in ("an END", "b", "so it was", "x") * 6], settings, range(24))


STOPS = ("e", "END", "\n\n", "né", "😀", "aa")


def test_responses_are_those_without_stop_strings_up_to_the_token_that_completes_one(engine: HfRolloutEngine) -> None:
    free, found = generate(engine), generate(engine, *STOPS)
    ends = set()
    for whole, cut in zip(free, found, strict=True):
        expected = ResponseText(engine.tokenizer, whole.prompt_ids, SamplingConfig(stop=STOPS))
        length = next((n for n, t in enumerate(whole.response_ids, 1) if t != 0 and expected.append(t)), None)
        assert cut.response_ids == whole.response_ids[:length]
        assert cut.logprobs is not None and whole.logprobs is not None
        assert torch.allclose(cut.logprobs, whole.logprobs[:length], atol=1e-5)
        assert cut.response == (whole.response if length is None else expected.text)
        assert cut.truncated == (length is None and whole.truncated)
        assert not any(stop in cut.response for stop in STOPS)
        ends.add((length is None, cut.truncated, cut.response_ids[-1] == 0))
    assert len({len(c.response_ids) for c in found}) > 5 and (False, False, False) in ends


def test_response_that_ends_with_a_stop_string_at_its_last_token_is_not_truncated(engine: HfRolloutEngine) -> None:
    lengths = [len(c.response_ids) for c in generate(engine, "e")]
    for length in set(lengths):
        for c, whole in zip(generate(engine, "e", max_new_tokens=length), lengths, strict=True):
            assert c.truncated == (whole > length)


def test_stop_string_with_a_special_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="'x<eos>', but the text of a response never contains special tokens such as '<eos>'"
    ):
        require_reachable_stops(SamplingConfig(stop=("fine", "x<eos>")), TOKENIZER)
    require_reachable_stops(SamplingConfig(stop=("fine", "eos")), TOKENIZER)


def test_text_of_a_response_is_decoded_after_its_prompt() -> None:
    """SentencePiece drops the space that begins a text, but not one that a response begins with."""
    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "▁a": 1, "▁END": 2}, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    text = ResponseText(tokenizer, [1], SamplingConfig(stop=(" END",)))
    assert [text.append(token) for token in (1, 2)] == [False, True]
    assert text.text == " a"
