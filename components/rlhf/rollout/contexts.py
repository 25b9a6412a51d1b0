"""What a response is sampled after: the prompt, and in later turns the response so far."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from components.rlhf.data.records import Prompt, is_chat
from components.rlhf.data.tokenizer import encode_prompt


def encode_contexts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], after: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """Ids of each prompt, and those that follow it, which are never tokenized again."""
    encoded = [encode_prompt(tokenizer, prompt.prompt, is_chat=is_chat(prompt)) for prompt in prompts]
    return encoded if after is None else [[*ids, *rest] for ids, rest in zip(encoded, after, strict=True)]
