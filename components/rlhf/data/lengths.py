"""Lengths of records in tokens, and the limits that they must fit into."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.data.examples import Unusable
from components.rlhf.data.records import Prompt, is_chat
from components.rlhf.data.token_files import PackedText, pack
from components.rlhf.data.tokenizer import Record, encode_completion, encode_prompt, encode_record

UNLIMITED = 2**62


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a record: of its prompt, and of the longest of its whole texts, end included, after cutting."""

    prompt: int
    text: int
    is_cut: bool = False


def fit_into_limits(
    record: Record, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Lengths, tuple[PackedText, ...]]:
    """The lengths and the texts, after cutting, of a record that fits into max_prompt_tokens and max_tokens. Raises Unusable.

    One of the max_tokens is for the token that ends an answer. With over_length 'cut' a long text is no reason, unless nothing
    that tells a pair apart is left.
    """
    if not encode_completion(tokenizer, record.prompt):
        raise Unusable("prompt without tokens", "its prompt has no tokens.")
    prompt = len(encode_prompt(tokenizer, record.prompt, is_chat=is_chat(record)))
    if prompt > data.max_prompt_tokens:
        raise Unusable(
            "prompt longer than max_prompt_tokens",
            f"its prompt has {prompt} tokens, and data.max_prompt_tokens is {data.max_prompt_tokens}.",
        )
    texts = encode_record(record, tokenizer, max_tokens=UNLIMITED)
    longest = max((text.num_tokens for text in texts), default=prompt)
    is_cut = longest > data.max_tokens
    if is_cut and data.over_length == "drop":
        raise Unusable(
            "text longer than max_tokens",
            f"its text has {longest} tokens, and data.max_tokens is {data.max_tokens}.",
        )
    limit = data.max_tokens - prompt
    if is_cut and len(texts) == 2 and texts[0].response_ids[:limit] == texts[1].response_ids[:limit]:
        raise Unusable(
            "equal answers after cutting",
            f"its answers do not differ within data.max_tokens ({data.max_tokens}).",
        )
    lengths = Lengths(prompt=prompt, text=min(longest, data.max_tokens), is_cut=is_cut)
    return lengths, tuple(pack(text.cut(data.max_tokens)) for text in texts)


def longest_prompt(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of the longest prompt; 0 without prompts."""
    return max((len(encode_prompt(tokenizer, p.prompt, is_chat=is_chat(p))) for p in prompts), default=0)
