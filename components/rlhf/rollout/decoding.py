"""Token-by-token decoding of a batch with any transformers decoder: what to pass to its forward, and how to drop rows."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.rlhf.models.layers import apply_head, decoder_of
from components.rlhf.models.packing import attends_by_position
from components.rlhf.rollout.cache import copy_rows, has_rows, keep_rows

CACHES = (
    "past_key_values",
    "cache_params",
    "state",
)  # names of the argument, and of the output, in transformers' decoders


class Decoding:
    """A batch that is being decoded: its tokens, attention mask and cache.

    Prompts are padded on the left, so that the next token of every row is in the same column. The cache is whatever the decoder
    returns. A decoder without a cache runs over all tokens in every step. The first step runs every distinct prompt once, and
    the rows of the batch are copies of them.
    """

    def __init__(self, model: Any, prompt_ids: Sequence[Sequence[int]]) -> None:
        self.model, self.decoder = model, decoder_of(model)
        numbers = {ids: number for number, ids in enumerate(dict.fromkeys(map(tuple, prompt_ids)))}
        self.prompts: Tensor | None = torch.tensor(
            [numbers[tuple(ids)] for ids in prompt_ids], device=model.device
        )  # distinct prompt of each row, until the first step has run
        self.tokens, self.mask = left_pad(list(numbers), model.device)
        self.arguments = set(inspect.signature(self.decoder.forward).parameters)
        self.allows_padding = attends_by_position(model)
        self.cache: dict[str, Any] = {}
        self.rows = torch.arange(
            len(prompt_ids), device=model.device
        )  # of the tokens, in which the cache has its states

    def advance(self) -> Tensor:
        """Run the decoder on the tokens that it has not seen; the logits [B, V] of the next ones."""
        hidden = self._run()
        if self.prompts is not None:
            hidden, self.prompts = self._copy_prompts(hidden, self.prompts), None
        return apply_head(self.model, hidden[self.rows] if len(self.rows) < len(hidden) else hidden)

    def append(self, sampled: Tensor, kept: Tensor | None) -> None:
        """Append one token [B] to every row, and keep only the rows `kept` (indices [b]) if it is given."""
        if len(self.rows) < len(self.tokens):  # rows that could not leave the batch go on with any token
            whole = torch.zeros_like(self.tokens[:, 0])
            whole[self.rows] = sampled
            sampled = whole
        self.mask = torch.cat([self.mask, torch.ones_like(sampled[:, None])], dim=1)
        self.tokens = torch.cat([self.tokens, sampled[:, None]], dim=1)
        if kept is None:
            return
        if self._has_rows:
            for cache in self.cache.values():
                keep_rows(cache, kept)
            self.tokens, self.mask = self.tokens[kept], self.mask[kept]
            self.rows = torch.arange(len(kept), device=kept.device)
        else:
            self.rows = self.rows[kept]

    @property
    def _has_rows(self) -> bool:
        return all(has_rows(cache) for cache in self.cache.values())

    def _run(self) -> Tensor:
        """Hidden states [B, H] after the last token."""
        tokens = self.tokens[:, -1:] if self.cache else self.tokens
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        known: dict[str, Any] = {"position_ids": positions, "use_cache": True}
        if self.allows_padding:
            known["attention_mask"] = self.mask
        inputs = {name: value for name, value in known.items() if name in self.arguments}
        output = self.decoder(input_ids=tokens, **inputs, **self.cache)
        found = {name: getattr(output, name, None) for name in CACHES if name in self.arguments}
        self.cache = {name: cache for name, cache in found.items() if cache is not None}
        # Contiguous, because on a strided slice the head would copy its weights once per row.
        hidden: Tensor = output.last_hidden_state[:, -1].contiguous()
        return hidden

    def _copy_prompts(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        """Go from the distinct prompts to the rows of the batch; their hidden states [B, H]."""
        is_repeated = len(prompts) > len(hidden)
        self.tokens, self.mask = self.tokens[prompts], self.mask[prompts]
        if is_repeated and not self._has_rows:
            self.cache = {}
            return self._run()
        if self._has_rows:
            for cache in self.cache.values():
                copy_rows(cache, prompts)
        return hidden[prompts]


def left_pad(prompt_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, P] int64, padded on the left."""
    width = max(len(ids) for ids in prompt_ids)
    tokens = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
    mask = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
    for row, ids in enumerate(prompt_ids):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens.to(device), mask.to(device)
