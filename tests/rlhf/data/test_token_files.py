"""Stored ids are those that training would compute, or they are not used."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from components.rlhf.config.prepare_data import DataConfig, DataSource
from components.rlhf.data import token_files
from components.rlhf.data.chat import DEFAULT_DATE
from components.rlhf.data.datasets import save_records
from components.rlhf.data.examples import Example
from components.rlhf.data.fields import Fields
from components.rlhf.data.lengths import fit_into_limits
from components.rlhf.data.records import Conversation, Demonstration, Message, PreferencePair, Turn
from components.rlhf.data.render import Renderer
from components.rlhf.data.shapes import CONVERTERS
from components.rlhf.data.token_files import PackedTexts, encode_all, pack, save_tokens
from components.rlhf.data.tokenizer import EncodedText, Record, encode_text, encode_turns, load_tokenizer
from components.rlhf.text.errors import InputError
from tests.support.chat_tokenizers import FAMILIES, make_tokenizer
from tests.support.tiny_model import make_tiny_tokenizer

UNLIMITED = 10**6
CHAT = Conversation(messages=(Message(role="user", content="u"),))
PIECES = ["a", " b", "é", "日本語", "\U0001f600", "\n", "  ", "<s>", "</s>", "<eos>", "▁", "x" * 30]
PIECES += ["<|im_end|>\n", "<|im_start|>user\n"]


def make_sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words begin with a mark, which a text that stands alone gets too; several characters may be one token."""
    pieces = ["<unk>", "</s>", "▁", "a", "b", "x", "▁b", "xx", "xxxx", "é", "\n"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    **{family: make_tokenizer(family) for family in FAMILIES},
    "adds EOS": make_tokenizer("llama 2", adds_eos=True),
    "tiny": make_tiny_tokenizer(),
    "SentencePiece": make_sentencepiece_like(),
}
DEMONSTRATIONS = [
    Demonstration(turns=(Turn(context=f"question {number}", answer=" one"), Turn(context="more", answer="two")))
    for number in range(20)
]
PAIRS = [PreferencePair(prompt="ab", chosen="c" * number, rejected="") for number in range(1, 12)]


def store(
    folder: Path, records: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int = 40, split: str = "train"
) -> None:
    """Write records and ids as prepare_data does."""
    source = DataSource(path="x.jsonl")
    data = DataConfig(preferences=source, prompts=source, max_prompt_tokens=1, max_tokens=max_tokens, over_length="cut")
    data = data.model_copy(update={"max_prompt_tokens": UNLIMITED})
    save_records(folder, split, records)
    texts = [text for record in records for text in fit_into_limits(record, data, tokenizer)[1]]
    save_tokens(folder, split, texts, tokenizer, max_tokens=max_tokens)


def read(
    folder: Path, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_tokens: int = 40
) -> tuple[PackedTexts, list[str]]:
    log: list[str] = []
    texts = encode_all(records, tokenizer, max_tokens=max_tokens, folder=folder, split="train", log=log.append)
    return texts, log


def expected(records: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_tokens: int = 40) -> list[EncodedText]:
    """Each text encoded whole and cut here."""
    texts = []
    for record in records:
        is_chat = record.conversation is not None
        if isinstance(record, Demonstration):
            texts.append(encode_turns(tokenizer, record.turns, max_tokens=UNLIMITED, is_chat=is_chat))
        else:
            for answer in (record.chosen, record.rejected):
                texts.append(encode_text(tokenizer, record.prompt, answer, max_tokens=UNLIMITED, is_chat=is_chat))
    room = [max(max_tokens - len(text.prompt_ids), 0) for text in texts]
    return [
        EncodedText(
            prompt_ids=text.prompt_ids,
            response_ids=text.response_ids[:left],
            response_mask=text.response_mask[:left],
            truncated=len(text.response_ids) > left,
        )
        for text, left in zip(texts, room, strict=True)
    ]


def check(texts: PackedTexts, wanted: list[EncodedText]) -> None:
    assert [texts[i] for i in range(len(texts))] == wanted == list(texts) == texts[:]
    assert texts.num_tokens == [text.num_tokens for text in wanted]
    assert texts.num_learned == [text.num_learned for text in wanted]


# --- equal ---

text = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=6).map("".join)
conversation = st.sampled_from([None, CHAT])
turns = st.lists(st.builds(Turn, context=text, answer=text), min_size=1, max_size=4).map(tuple)
demonstration = st.builds(Demonstration, turns=turns, conversation=conversation)
pair = st.builds(PreferencePair, prompt=text, chosen=text, rejected=text, conversation=conversation)


def usable(record: Demonstration | PreferencePair, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> bool:
    texts = expected([record], tokenizer, max_tokens)
    return bool(tokenizer(record.prompt, add_special_tokens=False)["input_ids"]) and (
        len(texts) == 1 or texts[0].response_ids != texts[1].response_ids
    )


@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    records=st.one_of(st.lists(demonstration, max_size=12), st.lists(pair, max_size=12)),
    max_tokens=st.integers(2, 80),
)
def test_stored_ids_are_those_of_the_texts(
    name: str, records: list[Demonstration | PreferencePair], max_tokens: int
) -> None:
    tokenizer = TOKENIZERS[name]
    records = [record for record in records if usable(record, tokenizer, max_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder), records, tokenizer, max_tokens)
        stored, log = read(Path(folder), records, tokenizer, max_tokens)
        assert log == []
        check(stored, expected(records, tokenizer, max_tokens))
    encoded, _ = read(Path(folder), records, tokenizer, max_tokens)  # without the file
    check(encoded, expected(records, tokenizer, max_tokens))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "no template"])
def test_rendered_conversations_with_several_turns(family: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(family)
    row: dict[str, Any] = {
        "messages": [{"role": r, "content": f"{r} {i}"} for i in "12" for r in ("user", "assistant")]
    }
    if family == "chatml with tools":
        row["tools"] = [{"type": "function", "function": {"name": "add"}}]
        call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
        row["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [call]}
        row["messages"].insert(2, {"role": "tool", "content": "4"})
    (example,) = CONVERTERS["demonstrations"](Fields(row))
    assert isinstance(example, Example)
    records = list(Renderer(tokenizer=tokenizer, is_chat=True, date=DEFAULT_DATE).demonstrations(example))
    store(tmp_path, records, tokenizer, UNLIMITED)
    stored, log = read(tmp_path, records, tokenizer, UNLIMITED)
    assert log == [] and stored.num_learned[0] < stored.num_tokens[0]
    check(stored, expected(records, tokenizer, UNLIMITED))


def test_lengths_are_known_and_texts_are_found_without_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TOKENIZERS["tiny"]
    store(tmp_path, DEMONSTRATIONS, tokenizer)
    wanted = expected(DEMONSTRATIONS, tokenizer)
    encoded = []
    encode = token_files.encode_record

    def counted(record: Record, *args: Any, **options: Any) -> list[EncodedText]:
        encoded.append(record)
        return encode(record, *args, **options)

    monkeypatch.setattr(token_files, "encode_record", counted)
    check(read(tmp_path, DEMONSTRATIONS, tokenizer)[0], wanted)
    assert len(encoded) == token_files.NUM_PROBES


def test_first_records_of_a_split(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["tiny"]
    store(tmp_path, PAIRS, tokenizer)
    texts, log = read(tmp_path, PAIRS[:3], tokenizer)
    assert log == []
    check(texts, expected(PAIRS[:3], tokenizer))
    with pytest.raises(IndexError):
        texts[6]
    assert texts[-1] == texts[5]


def test_mask_that_begins_with_a_token_without_loss() -> None:
    text = EncodedText(prompt_ids=[1], response_ids=[2, 3, 4], response_mask=[False, True, True], truncated=True)
    check(PackedTexts(token_files._arrays([pack(text)] * 2), 2), [text, text])


def test_file_is_the_same_every_time(tmp_path: Path) -> None:
    contents = set()
    for _ in range(5):
        store(tmp_path, PAIRS, make_tiny_tokenizer())
        contents.add((tmp_path / "train.tokens.safetensors").read_bytes())
    assert len(contents) == 1


def test_copy_of_a_tokenizer_reads_the_ids(tmp_path: Path) -> None:
    for name in ("tiny", "llama 3", "no template"):
        TOKENIZERS[name].save_pretrained(tmp_path / name)
        store(tmp_path, DEMONSTRATIONS, TOKENIZERS[name])
        assert read(tmp_path, DEMONSTRATIONS, load_tokenizer(tmp_path / name))[1] == []


def test_truncation_of_an_earlier_call_does_not_matter(tmp_path: Path) -> None:
    store(tmp_path, DEMONSTRATIONS, TOKENIZERS["tiny"])
    other = make_tiny_tokenizer()
    assert read(tmp_path, DEMONSTRATIONS, other)[1] == []
    other("a long text", truncation=True, max_length=3, padding="max_length")
    assert read(tmp_path, DEMONSTRATIONS, other)[1] == []


# --- not used ---


def without_merging() -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["question"])
    return tokenizer


def stripping() -> PreTrainedTokenizerFast:
    """Differs from the one below only in a flag of an added token, which tokenizer_digest does not see."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("one", lstrip=True)])
    return tokenizer


def not_stripping() -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("one", lstrip=False)])
    return tokenizer


def other_template() -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def other_end() -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "a"
    return tokenizer


@pytest.mark.parametrize(
    ("writer", "reader", "reason"),
    [
        (make_tiny_tokenizer, without_merging, "tokenizer"),
        (stripping, not_stripping, "tokenizer"),
        (make_tiny_tokenizer, other_end, "tokenizer"),
        (make_tiny_tokenizer, other_template, "chat_template"),
        (lambda: make_tokenizer("qwen"), lambda: make_tokenizer("llama 3"), "chat_template, tokenizer"),
    ],
)  # fmt: skip
def test_ids_of_another_tokenizer_are_not_used(tmp_path: Path, writer: Any, reader: Any, reason: str) -> None:
    store(tmp_path, DEMONSTRATIONS, writer())
    texts, log = read(tmp_path, DEMONSTRATIONS, reader())
    assert log == [f"tokenizing train again: the stored ids do not match in {reason}"]
    check(texts, expected(DEMONSTRATIONS, reader()))


@pytest.mark.parametrize("max_tokens", [39, 41, 10])
def test_ids_for_another_max_tokens_are_not_used(tmp_path: Path, max_tokens: int) -> None:
    tokenizer = TOKENIZERS["tiny"]
    store(tmp_path, PAIRS, tokenizer)
    texts, log = read(tmp_path, PAIRS, tokenizer, max_tokens)
    assert log == ["tokenizing train again: the stored ids do not match in max_tokens"]
    check(texts, expected(PAIRS, tokenizer, max_tokens))


def test_ids_of_other_records_are_not_used(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["tiny"]
    store(tmp_path, PAIRS, tokenizer)
    others = [*PAIRS[:-1], replace(PAIRS[-1], chosen="d" * 11)]
    save_records(tmp_path, "train", others)
    texts, log = read(tmp_path, others, tokenizer)
    assert log == ["tokenizing train again: the stored ids do not match in records"]
    check(texts, expected(others, tokenizer))


def test_ids_of_other_software_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["tiny"]
    store(tmp_path, PAIRS, tokenizer)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    assert "version of tokenizers, version of transformers" in read(tmp_path, PAIRS, tokenizer)[1][0]


def test_ids_that_are_not_those_of_a_text_are_not_used(tmp_path: Path) -> None:
    tokenizer, path = TOKENIZERS["tiny"], tmp_path / "train.tokens.safetensors"
    store(tmp_path, PAIRS, tokenizer)
    change(path, lambda values: values["ids"].__setitem__(0, 7))
    texts, log = read(tmp_path, PAIRS, tokenizer)
    assert log == ["tokenizing train again: the stored ids of record 0 are not those of its text"]
    check(texts, expected(PAIRS, tokenizer))


def test_tokenizer_whose_rules_cannot_be_read_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "encoding_digest", lambda tokenizer: None)
    store(tmp_path, PAIRS, TOKENIZERS["tiny"])
    assert not (tmp_path / "train.tokens.safetensors").exists()
    check(read(tmp_path, PAIRS, TOKENIZERS["tiny"])[0], expected(PAIRS, TOKENIZERS["tiny"]))
    path = tmp_path / "train.tokens.safetensors"
    save_file({"ids": np.zeros(1, dtype=np.int32)}, path, metadata={"key": "{}"})
    assert read(tmp_path, PAIRS, TOKENIZERS["tiny"])[1] == [
        "tokenizing train again: the stored ids do not match in tokenizer"
    ]


# --- damaged ---


def change(path: Path, edit: Any) -> None:
    """Change the arrays of a file, keeping its key."""
    with token_files.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    values = {name: array.copy() for name, array in load_file(path).items()}
    edit(values)
    save_file(values, path, metadata=metadata)


def shorter(name: str) -> Any:
    return lambda values: values.update({name: values[name][:-1].copy()})


def filled(name: str, row: int, value: int) -> Any:
    return lambda values: values[name].__setitem__(row, value)


@pytest.mark.parametrize(
    "edit",
    [
        *(shorter(name) for name in ("ids", "runs", *token_files.COLUMNS)),
        *(filled(name, 3, -1) for name in ("lengths", "prompt_lengths", "num_runs", "runs")),
        *(filled(name, 3, 9) for name in ("lengths", "prompt_lengths", "num_runs", "runs")),
        lambda values: values.pop("truncated"),
        lambda values: values.update(ids=values["ids"].astype(np.int16)),
    ],
)
def test_file_whose_lengths_contradict_each_other_is_refused(tmp_path: Path, edit: Any) -> None:
    path = tmp_path / "train.tokens.safetensors"
    store(tmp_path, PAIRS, TOKENIZERS["tiny"])
    change(path, edit)
    with pytest.raises(InputError) as caught:
        read(tmp_path, PAIRS, TOKENIZERS["tiny"])
    assert str(caught.value).startswith(f"{path} is not a valid file of token ids (")
    assert str(caught.value).endswith("); run prepare_data again.")


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_file_that_ends_early_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "train.tokens.safetensors"
    store(tmp_path, PAIRS, TOKENIZERS["tiny"])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"is not a valid file of token ids \(.+\); run prepare_data again\.$"):
        read(tmp_path, PAIRS, TOKENIZERS["tiny"])
