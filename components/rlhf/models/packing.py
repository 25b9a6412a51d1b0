"""Rows of different lengths as one sequence: the layers compute no padding, and attention runs on rows of similar length.

Where attention is torch's (`sdpa`), no mask over the whole pack is needed: packed_attention() takes the rows apart, as variable-length
kernels do, on any device.
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from components.rlhf.data.microbatches import Plan, fill_microbatches, plan_passes
from components.rlhf.models.layers import Output, decoder_of, run_layers

# Entries of transformers' configs that are the tokens of a sliding window or a chunk.
WINDOWS = (
    "sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_window_size", "local_attention",
)  # fmt: skip
# Model types whose attention adds a learned mask to the causal one, or does not pass options on to torch's.
NOT_PACKED = ("doge", "nemotron")


def attends_by_position(model: Any) -> bool:
    """Whether a token's states depend only on the tokens that it attends to and on their given positions.

    Then padding on the left or other rows in the same sequence change nothing. This is not so if the decoder has no position_ids, so
    that it would count the padding, or if a layer is neither full nor sliding attention: recurrent states would contain other
    tokens, and chunks or blocks of attention would begin in them.
    """
    decoder = decoder_of(model)
    arguments = inspect.signature(decoder.forward).parameters
    if not {"attention_mask", "position_ids", "past_key_values"} <= set(arguments):
        return False
    kinds = getattr(decoder.config.get_text_config(), "layer_types", None) or ["full_attention"]
    layers = DynamicCache(config=decoder.config).layers
    is_recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    return set(kinds) <= {"full_attention", "sliding_attention"} and not is_recurrent


def pack_limit(model: Any) -> int:
    """Tokens of the longest row that can be packed with others; 0 if the model cannot pack.

    It can if it attends by position, with torch's attention, and hands options down to it. In a row within the shortest sliding window
    that the config names, used or not, attention is causal and nothing else.
    """
    decoder = decoder_of(model)
    takes_options = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(decoder.forward).parameters.values())
    uses_torch = decoder._supports_attention_backend and decoder.config._attn_implementation == "sdpa"
    config = decoder.config.get_text_config()
    if not (takes_options and uses_torch and attends_by_position(model)) or config.model_type in NOT_PACKED:
        return 0
    windows = [value for name in WINDOWS if type(value := getattr(config, name, None)) is int and value > 0]
    return min(windows, default=sys.maxsize)


def plan_for(*models: Any) -> Plan:
    """How rows are grouped into passes that run through all these models (each with an attribute `pack_limit`)."""
    limit = min(model.pack_limit for model in models)

    def plan(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        passes = []
        for grouped, packs in ((fill_microbatches, True), (plan_passes, False)):
            rows = [row for row, length in enumerate(lengths) if (length <= limit) == packs]
            passes += [[rows[i] for i in part] for part in grouped([lengths[row] for row in rows], max_tokens)]
        return passes

    return plan


def run_rows(
    model: Any,
    input_ids: Tensor,
    lengths: Tensor,
    *,
    pack_limit: int,
    start: int = 0,
    stop: int | None = None,
    states: Tensor | None = None,
    **options: Any,
) -> Any:
    """run_layers() of right-padded rows [B, S] with these lengths [B]; rows within the limit are packed, so that no padding is computed.

    The result has 0 at padding then, and router_logits of the real tokens only.
    """
    width = input_ids.shape[1]
    sizes = lengths.tolist() if width <= pack_limit else []
    if not sizes or min(sizes) == width:
        return run_layers(model, input_ids, start=start, stop=stop, states=states, **options)
    rows = PackedRows(sizes, width, input_ids.device)
    output = run_layers(
        model,
        rows.pack(input_ids),
        start=start,
        stop=stop,
        states=None if states is None else rows.pack(states),
        position_ids=rows.position_ids,
        # transformers takes a mask with four dimensions as it is; it would make one over the whole pack. Ordinary attention cannot use
        # a mask over 0 tokens, so that a layer that does not hand packed_rows on ends with an error.
        attention_mask=torch.ones(1, 1, 1, 0, dtype=torch.bool, device=input_ids.device),
        packed_rows=rows,
        **options,
    )
    if stop is not None:
        return rows.unpack(output)
    router_logits = getattr(output, "router_logits", None)
    return Output(last_hidden_state=rows.unpack(output.last_hidden_state), router_logits=router_logits)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows of similar length, next to each other in the pack."""

    start: int  # of their tokens in the pack
    lengths: list[int]
    padded: (
        Tensor | None
    )  # [R * L] index of the token at each place of the padded rows; None if all rows have the same length
    real: Tensor | None  # [N] place of each token in the padded rows

    def rows(self, x: Tensor) -> Tensor:
        """The padded rows [R, A, L, D] of a packed tensor [1, A, N, D]."""
        if self.padded is None:
            part = x.narrow(2, self.start, sum(self.lengths))
        else:
            part = x.index_select(2, self.padded)
        return part[0].reshape(part.shape[1], len(self.lengths), max(self.lengths), -1).transpose(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens [N, A, D] of padded rows [R, L, A, D]."""
        flat: Tensor = x.flatten(0, 1)
        return flat if self.real is None else flat.index_select(0, self.real)


class PackedRows:
    """How the rows [B, S] of a right-padded batch are packed: in the order of their lengths."""

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        self.shape = (len(lengths), width)
        self.groups: list[Group] = []
        places, positions, start = [], [], 0
        for rows in plan_passes(lengths, sum(lengths) + max(lengths) * len(lengths)):
            sizes = [lengths[row] for row in rows]
            steps = [torch.arange(size) for size in sizes]
            places += [step + row * width for step, row in zip(steps, rows, strict=True)]
            positions += steps
            self.groups.append(_group(start, sizes, device))
            start += sum(sizes)
        self.places = torch.cat(places).to(device)  # [N] of each token in the flattened batch
        self.position_ids = torch.cat(positions)[None].to(device)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, *] -> [1, N, *]"""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, *] -> [B, S, *], 0 at padding"""
        flat = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return flat.index_copy(0, self.places, x[0]).view(*self.shape, *x.shape[2:])

    def attend(self, module: torch.nn.Module, states: Sequence[Tensor], *args: Any, **options: Any) -> Tensor:
        """Causal attention [1, N, heads, D] within each row. states are query, key and value [1, heads, N, D]."""
        parts = []
        for group in self.groups:
            query, key, value = (group.rows(x) for x in states)
            parts.append(group.tokens(sdpa_attention_forward(module, query, key, value, None, *args, **options)[0]))
        return torch.cat(parts)[None]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    packed_rows: PackedRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention `sdpa`, which with packed_rows runs on each group of rows without a mask.

    query, key and value are [1, heads, N, D]; returns [1, N, heads, D]. Raises ValueError for a layer with a bias of its own.
    """
    if packed_rows is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, *args, **options)
        return found
    has_bias = attention_mask is not None and attention_mask.dtype != torch.bool
    if has_bias or options.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias, so its rows cannot be packed")
    return packed_rows.attend(module, (query, key, value), *args, **options), None


def _group(start: int, lengths: list[int], device: torch.device) -> Group:
    longest = max(lengths)
    if min(lengths) == longest:
        return Group(start=start, lengths=lengths, padded=None, real=None)
    padded = torch.full((len(lengths), longest), start)  # padding repeats any token: causal attention does not see it
    real, offset = [], start
    for row, length in enumerate(lengths):
        padded[row, :length] = torch.arange(offset, offset + length)
        real.append(torch.arange(length) + row * longest)
        offset += length
    return Group(start=start, lengths=lengths, padded=padded.flatten().to(device), real=torch.cat(real).to(device))


# Without packed_rows nothing changes for any model.
ALL_ATTENTION_FUNCTIONS.register("sdpa", packed_attention)
