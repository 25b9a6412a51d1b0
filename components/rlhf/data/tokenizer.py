"""The tokenizer: loading, digests, and encoding of prompts and completions as separate sequences of ids."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from components.rlhf.text.errors import InputError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. PAD defaults to EOS; masks never depend on it. Raises InputError."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{directory} has no tokenizer (no tokenizer.json); save the model's tokenizer into it.")
    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer = cast(PreTrainedTokenizerBase, loaded)
    except BaseException as error:  # a broken tokenizer.json raises any type; a Rust panic is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise InputError(f"{directory}: the tokenizer cannot be loaded ({reason}); save it again.") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{directory}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that determines ids: the vocabulary with its rules, and the ids of EOS and PAD."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules}|{tokenizer.eos_token_id}|{tokenizer.pad_token_id}".encode()).hexdigest()


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """One prompt with one completion. A complete text ends with EOS; a truncated one does not."""

    prompt_ids: list[int]
    response_ids: list[int]
    truncated: bool

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt. No special tokens are added: a chat template already contains them."""
    return cast(list[int], tokenizer(prompt, add_special_tokens=False)["input_ids"])


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, max_tokens: int) -> EncodedText:
    """Ids of a prompt and its completion, tokenized separately, as a model that continues the prompt would generate them.

    Texts of more than max_tokens (EOS included) are truncated and have no EOS.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = [*encode_prompt(tokenizer, completion), cast(int, tokenizer.eos_token_id)]
    limit = max(max_tokens - len(prompt_ids), 0)
    return EncodedText(prompt_ids=prompt_ids, response_ids=response_ids[:limit], truncated=len(response_ids) > limit)
