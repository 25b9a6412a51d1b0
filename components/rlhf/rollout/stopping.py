"""Stop strings: the text of a response while it grows, and the string that ends it."""

from collections.abc import Sequence
from typing import Any

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.tokenizer import decode_response
from components.rlhf.text.errors import InputError

INCOMPLETE = "\ufffd"  # what a decoder makes of the first bytes of a character


class ResponseText:
    """The text that a response adds to its prompt, as vLLM 0.32 decodes it to look for stop strings.

    A token whose text ends within a character adds it when the character is complete. A stop string counts if it is complete within the
    text of the response, from the token after the first min_new_tokens on; the prompt does not count. Of several strings in the text
    of one token the one that is complete first ends the response, and of those the first in the settings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], sampling: SamplingConfig) -> None:
        self.text = ""  # ends before the stop string, once there is one
        self.stopped = False
        self._stops, self._min_new_tokens = sampling.stop, sampling.min_new_tokens
        self._tokenizer, self._prompt_ids, self._ids = tokenizer, list(prompt_ids), list[int]()
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = None if self._backend is None else _stream(self._prompt_ids)

    def append(self, token: int) -> bool:
        """Whether this token completes a stop string."""
        self._ids.append(token)
        before = len(self.text)
        self.text += self._next_text(token)
        if len(self._ids) <= self._min_new_tokens or len(self.text) == before:
            return False
        found = [(end, start) for stop in self._stops for start, end in [_find(self.text, stop, before)] if start >= 0]
        if found:
            _, start = min(found, key=lambda bounds: bounds[0])
            self.text, self.stopped = self.text[:start], True
        return self.stopped

    def _next_text(self, token: int) -> str:
        if self._stream is None:
            whole = decode_response(self._tokenizer, self._prompt_ids, self._ids)
            return "" if whole.endswith(INCOMPLETE) else whole[len(self.text) :]
        try:
            text = self._stream.step(self._backend, token)
        except Exception as error:  # tokenizers raises Exception itself, for bytes that are no text
            if not str(error).startswith("Invalid prefix encountered"):
                raise
            self._stream = _stream([])
            text = self._stream.step(self._backend, token)
        return text or ""


def require_reachable_stops(sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a stop string with a special token, which the text of a response never contains."""
    for stop in sampling.stop:
        special = next((token for token in tokenizer.all_special_tokens if token in stop), None)
        if special is not None:
            raise InputError(
                f"sampling.stop has {stop!r}, but the text of a response never contains special tokens such as {special!r}; remove it: "
                "responses end at the end-of-sequence and end-of-turn tokens of the model anyway."
            )


def _stream(prompt_ids: list[int]) -> Any:
    return decoders.DecodeStream(ids=prompt_ids, skip_special_tokens=True)


def _find(text: str, stop: str, before: int) -> tuple[int, int]:
    """Start (-1: none) and end of the first occurrence of a stop string that ends after the first `before` characters."""
    start = text.find(stop, max(before - len(stop) + 1, 0))
    return start, start + len(stop)
