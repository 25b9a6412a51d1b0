"""A tokenizer of as many ids as the tiny models have, with tokens of several characters and of parts of characters."""

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = 257
PIECES = [
    "\n",
    "\n\n",
    "ab",
    "b\n\nc",
    "END",
    "xENDy",
    "EN",
    "Dog",
    "a\n",
    "\nb",
    "é",
    "né",
    "日本",
    "😀",
    " the",
    "the END of",
]
PARTS = [
    "😀".encode()[:2],
    "😀".encode()[2:],
    b"END" + "😀".encode()[:1],
    "😀".encode()[1:],
    "é".encode()[:1],
    "é".encode()[1:],
]


def make_wordy_tokenizer() -> PreTrainedTokenizerFast:
    """<eos>, the printable ASCII characters, PIECES, PARTS, and pairs of letters for the rest."""
    byte_of = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))
    written = _written_bytes()
    assert set(written.values()) == byte_of.keys()
    contents = [character.encode() for character in string.ascii_letters + string.digits + " .,!?"]
    contents += [piece.encode() for piece in PIECES] + PARTS
    pairs = (f"{a}{b}".encode() for a in string.ascii_lowercase for b in string.ascii_lowercase)
    contents = list(dict.fromkeys([*contents, *pairs]))[: SIZE - 1]
    tokens = ["".join(written[byte] for byte in content) for content in contents]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<eos>", *tokens])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def use_wordy_tokenizer(folder: Path) -> Path:
    """Replace the tokenizer of a tiny model."""
    make_wordy_tokenizer().save_pretrained(folder)
    return folder


def _written_bytes() -> dict[int, str]:
    """The character that a byte-level tokenizer writes for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
