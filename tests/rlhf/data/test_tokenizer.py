import json
import shutil
from pathlib import Path

import pytest

from components.rlhf.data.tokenizer import (
    chat_template_digest,
    encode_prompt,
    encode_text,
    load_tokenizer,
    tokenizer_digest,
)
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
EOS = 0
A, B, C, D = encode_prompt(TOKENIZER, "abcd")


# --- encoding ---


def test_complete_text_ends_with_eos() -> None:
    encoded = encode_text(TOKENIZER, "ab", "cd", max_tokens=5)
    assert (encoded.prompt_ids, encoded.response_ids, encoded.truncated) == ([A, B], [C, D, EOS], False)
    assert encoded.num_tokens == 5


@pytest.mark.parametrize(("max_tokens", "response"), [(4, [C, D]), (3, [C]), (2, []), (1, []), (0, [])])
def test_truncated_text_has_no_eos(max_tokens: int, response: list[int]) -> None:
    encoded = encode_text(TOKENIZER, "ab", "cd", max_tokens=max_tokens)
    assert (encoded.prompt_ids, encoded.response_ids, encoded.truncated) == ([A, B], response, True)


def test_empty_completion_is_only_eos() -> None:
    assert encode_text(TOKENIZER, "ab", "", max_tokens=9).response_ids == [EOS]


def test_prompt_and_completion_are_tokenized_separately(tmp_path: Path) -> None:
    """A model that continues a prompt never merges both into one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert encode_prompt(merging, "ab") == [3]
    encoded = encode_text(merging, "a", "b", max_tokens=9)
    assert (encoded.prompt_ids, encoded.response_ids) == ([1], [2, 0])


# --- loading ---


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def test_load_tokenizer(folder: Path) -> None:
    loaded = load_tokenizer(folder)
    assert tokenizer_digest(loaded) == tokenizer_digest(TOKENIZER)
    assert chat_template_digest(loaded) == chat_template_digest(TOKENIZER)


def test_pad_defaults_to_eos(folder: Path) -> None:
    rewrite(folder, pad_token=None)
    assert load_tokenizer(folder).pad_token_id == EOS


def test_missing_tokenizer_is_rejected(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    assert str(caught.value) == f"{folder} has no tokenizer (no tokenizer.json); save the model's tokenizer into it."


def test_broken_tokenizer_is_rejected(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_missing_eos_is_rejected(folder: Path) -> None:
    rewrite(folder, eos_token=None, pad_token=None)
    with pytest.raises(InputError, match="has no end-of-sequence token; set eos_token in tokenizer_config.json"):
        load_tokenizer(folder)


# --- identity ---


def test_digest_depends_on_everything_that_determines_ids() -> None:
    same, other_pad, other_eos = make_tiny_tokenizer(), make_tiny_tokenizer(), make_tiny_tokenizer()
    assert tokenizer_digest(same) == tokenizer_digest(TOKENIZER)
    other_pad.pad_token = "a"
    assert tokenizer_digest(other_pad) == tokenizer_digest(TOKENIZER)  # masks come from lengths
    other_eos.eos_token = "a"
    assert tokenizer_digest(other_eos) != tokenizer_digest(TOKENIZER)
    larger = make_tiny_tokenizer()
    larger.add_tokens(["zebra"])
    assert tokenizer_digest(larger) != tokenizer_digest(TOKENIZER)


def test_chat_template_has_a_separate_digest() -> None:
    other, none = make_tiny_tokenizer(), make_tiny_tokenizer()
    other.chat_template = "{{ messages }}"
    none.chat_template = None
    assert tokenizer_digest(other) == tokenizer_digest(TOKENIZER)
    assert len({chat_template_digest(t) for t in (TOKENIZER, other, none)}) == 3
