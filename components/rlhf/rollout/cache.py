"""Rows of a transformers cache: copied for the samples of one prompt, dropped when they stop, and with room to grow."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

ROOM = 64  # tokens by which a layer grows


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of full attention with room for further tokens: a DynamicLayer copies all of them for every token.

    keys and values are views of the part that is in use. It grows by ROOM tokens, and not at once by those of the longest
    response, so that memory is used only for rows that have not stopped.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor) -> None:
        """Copies the rows [B] of a layer that has seen the prompts; a row may occur several times."""
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device = layer.dtype, layer.device
        self.is_initialized = True
        self._rooms = [_with_room(states[rows]) for states in (layer.keys, layer.values)]
        self._use(len(rows), layer.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        start, rows = self.keys.shape[-2], len(self.keys)
        end = start + key_states.shape[-2]
        if end > self._rooms[0].shape[-2]:
            self._rooms = [_with_room(states, end) for states in (self.keys, self.values)]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:rows, ..., start:end, :] = states
        self._use(rows, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of indices [b], in this order; only those that change their place are copied."""
        assert self.keys is not None and self.values is not None
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        if len(moved):
            for states in (self.keys, self.values):
                states[moved] = states[indices[moved]]
        self._use(len(indices), self.keys.shape[-2])

    def _use(self, rows: int, length: int) -> None:
        self.keys, self.values = (room[:rows, ..., :length, :] for room in self._rooms)


def _with_room(states: Tensor, length: int = 0) -> Tensor:
    """A copy of states [B, ..., L, D] with room for at least length tokens, and ROOM more than it has."""
    used = states.shape[-2]
    room = states.new_empty(*states.shape[:-2], max(used, length) + ROOM, states.shape[-1])
    room[..., :used, :] = states
    return room


def has_rows(cache: Any) -> bool:
    """Whether rows of the cache can be copied and dropped."""
    return hasattr(cache, "layers")


def copy_rows(cache: Any, rows: Tensor) -> None:
    """Make a cache of distinct prompts into that of a batch, whose row i is the prompt rows[i], with room for its responses."""
    is_same = len(rows) == int(rows.max()) + 1 and bool((rows == torch.arange(len(rows), device=rows.device)).all())
    for index, layer in enumerate(cache.layers):
        if _is_plain(layer):
            cache.layers[index] = GrowingLayer(layer, rows)
        elif not is_same:
            _select(layer, rows)


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keep only these rows of the batch, in this order."""
    for layer in cache.layers:
        _select(layer, rows)


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is DynamicLayer
        and layer.is_initialized
        and layer.keys is not None
        and layer.values is not None
        and layer.keys.shape[:-1] == layer.values.shape[:-1]
    )


def _select(layer: Any, rows: Any) -> None:
    # Layers with a recurrent state have no batch_select_indices of their own; reordering by other rows selects them.
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        layer.reorder_cache(rows)
    else:
        layer.batch_select_indices(rows)
