"""Examples of records as the model will see them: the decoded tokens, and which of them are learned."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, is_chat
from components.rlhf.data.tokenizer import EncodedText, Record, encode_prompt, encode_record

CONTEXT, LEARNED, CHOSEN, REJECTED = "context", "learned", "chosen", "rejected"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive tokens of one kind: context, which carries no loss, or an answer that is learned, chosen or rejected."""

    text: str
    kind: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    title: str
    segments: list[Segment]
    is_truncated: bool = False


def choose(records: Sequence[Record], number: int, *, seed: int) -> list[Record]:
    return random.Random(seed).sample(list(records), min(number, len(records)))


def show(title: str, record: Record, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> ShownExample:
    """The segments of a record, decoded from the ids that training uses."""
    texts = encode_record(record, tokenizer, max_tokens=max_tokens)
    if isinstance(record, PreferencePair):
        chosen, rejected = texts
        segments = [
            *_segments(tokenizer, chosen, CHOSEN),
            *_segments(tokenizer, rejected, REJECTED)[1:],  # after the same prompt
        ]
    elif isinstance(record, Demonstration):
        segments = _segments(tokenizer, texts[0], LEARNED)
    else:
        ids = encode_prompt(tokenizer, record.prompt, is_chat=is_chat(record))
        columns = record.columns if isinstance(record, Prompt) else {}
        title += "".join(f", {name}: {' '.join(text.split())[:80]}" for name, text in columns.items())
        segments = [Segment(text=str(tokenizer.decode(ids)), kind=CONTEXT, num_tokens=len(ids))]
    return ShownExample(title=title, segments=segments, is_truncated=any(text.truncated for text in texts))


def _segments(tokenizer: PreTrainedTokenizerBase, encoded: EncodedText, kind: str) -> list[Segment]:
    """The prompt and the runs of tokens with and without loss. Their texts together are the text of all ids."""
    ids = [*encoded.prompt_ids, *encoded.response_ids]
    mask = [False] * len(encoded.prompt_ids) + encoded.response_mask
    segments: list[Segment] = []
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and mask[end] == mask[start]:
            continue
        upto = str(tokenizer.decode(ids[:end]))
        text = upto[len(before) :] if upto.startswith(before) else str(tokenizer.decode(ids[start:end]))
        segments.append(Segment(text=text, kind=kind if mask[start] else CONTEXT, num_tokens=end - start))
        start, before = end, upto
    return segments
