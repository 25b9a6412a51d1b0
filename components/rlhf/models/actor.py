"""The actor, and the frozen reference of the same class: log-probs of response tokens."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.rlhf.data.batching import TokenBatch
from components.rlhf.maths.logprobs import entropy, token_logprobs
from components.rlhf.maths.truncation import keep_only, kept_tokens, penalize_repetition, seen_tokens
from components.rlhf.models.layers import apply_head, freeze_lower_layers
from components.rlhf.models.lora import adapters_enabled, merged_weights, separate_weights
from components.rlhf.models.packing import pack_limit, run_rows
from components.rlhf.models.precision import autocast_to
from components.rlhf.models.router import RouterLoss

# Logits that are computed at once: 64 MiB in fp32 on a CPU, where larger pieces are no faster, and 256 MiB on a GPU, which needs them.
# Log-probs, entropy and gradient take a few times that on a GPU, and little more than that on a CPU.
MAX_LOGITS = 2**24
MAX_LOGITS_ON_GPU = 2**26


@dataclass(frozen=True, kw_only=True)
class SamplingDistribution:
    """The distribution that tokens are sampled from, in rollout, reference and update alike.

    Logits without stop tokens before min_new_tokens, after the repetition penalty, divided by the temperature; of their softmax
    min_p, top_k and top_p keep some tokens (maths/truncation.py), whose probabilities are renormalized.
    """

    temperature: float = 1.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def mask_early_stops(self, logits: Tensor, steps: Tensor) -> Tensor:
        """logits [N, V] with -inf at stop ids in rows whose step (steps [N], from 0) is below min_new_tokens."""
        if self.min_new_tokens == 0 or not self.stop_ids:
            return logits
        stops = torch.tensor(self.stop_ids, device=logits.device)
        early = (steps < self.min_new_tokens)[:, None]
        return logits.index_copy(1, stops, logits[:, stops].masked_fill(early, float("-inf")))

    def penalize(self, logits: Tensor, seen: Tensor) -> Tensor:
        """logits [N, V] after the repetition penalty on the tokens of seen [N, V] bool: those of the prompt and the response so far."""
        return penalize_repetition(logits, seen, self.repetition_penalty)

    def kept(self, logits: Tensor) -> Tensor:
        """Whether each token of logits [N, V], before the division by the temperature, can be sampled: [N, V] bool."""
        with torch.no_grad():
            return kept_tokens(logits, self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    def truncate(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [N, V] with -inf at the tokens that cannot be sampled. The labels [N] always remain.

        So a token that another model or an older policy sampled has a finite log-prob, also where this one would not keep it.
        """
        return keep_only(logits, self.kept(logits), labels) if self.truncates else logits


@dataclass(frozen=True, kw_only=True)
class Places:
    """N response tokens of a batch: the row and the position in its response of each."""

    batch: TokenBatch
    rows: Tensor  # [N]
    steps: Tensor  # [N], from 0

    def __len__(self) -> int:
        return len(self.steps)

    def piece(self, start: int, stop: int) -> "Places":
        return Places(batch=self.batch, rows=self.rows[start:stop], steps=self.steps[start:stop])

    def adjust(self, logits: Tensor, distribution: SamplingDistribution) -> Tensor:
        """logits [N, V] of these tokens without early stop tokens and after the repetition penalty."""
        logits = distribution.mask_early_stops(logits, self.steps)
        if distribution.repetition_penalty == 1:
            return logits
        lengths = self.batch.prompt_lengths[self.rows] + self.steps
        seen = seen_tokens(self.batch.input_ids[self.rows], lengths, logits.shape[-1])
        return distribution.penalize(logits, seen)


class Actor(nn.Module):
    """A causal language model whose lowest layers may be frozen.

    trunk(batch) returns the hidden states after the frozen layers; forward(batch, states) reuses or computes them.
    With with_adapters False the LoRA adapters are off, which gives the reference from the weights of the actor.
    max_over_ranks(n) is the largest n of the ranks that shard this model (ZeRO-3), whose passes must use the head equally often.
    router_loss is the auxiliary loss of a mixture of experts in the last forward pass, if gradients are enabled; else None.
    """

    def __init__(
        self,
        lm: Any,
        *,
        num_frozen_layers: int,
        dtype: torch.dtype,
        with_adapters: bool = True,
        max_over_ranks: Callable[[int], int] = int,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.num_frozen_layers = num_frozen_layers
        self.dtype = dtype
        self.with_adapters = with_adapters
        self.max_over_ranks = max_over_ranks
        self.router_loss: Tensor | None = None
        self._router = RouterLoss.of(lm.config)
        self.pack_limit = pack_limit(lm)
        freeze_lower_layers(lm, num_frozen_layers)

    @torch.no_grad()
    def trunk(self, batch: TokenBatch) -> Tensor | None:
        """Hidden states after the frozen layers [B, S, H], or None when no layer is frozen."""
        if self.num_frozen_layers == 0:
            return None
        with autocast_to(self.dtype, batch.input_ids.device):
            return cast(Tensor, self._run(batch, stop=self.num_frozen_layers))

    def forward(
        self,
        batch: TokenBatch,
        distribution: SamplingDistribution,
        states: Tensor | None = None,
        *,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each response token and entropy of its distribution, both [B, T] fp32 and 0 at padding.

        The entropy is 0 unless with_entropy.
        """
        mask = batch.response_mask
        with autocast_to(self.dtype, batch.input_ids.device):
            states_before, places = self._states_before(batch, states)
            bounds = self._pieces(len(places), batch)
            labels = batch.response_ids[mask]
            with adapters_enabled(self.lm, on=self.with_adapters):
                pieces = [
                    self._head(states_before[a:b], labels[a:b], places.piece(a, b), distribution, with_entropy)
                    for a, b in pairwise(bounds)
                ]
        zeros = torch.zeros(mask.shape, device=mask.device)
        logprobs, entropies = (zeros.masked_scatter(mask, torch.cat(parts)) for parts in zip(*pieces, strict=True))
        return logprobs, entropies

    @torch.no_grad()
    def logits(
        self, batch: TokenBatch, distribution: SamplingDistribution, states: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Logits [n, V] of the response tokens, -inf for masked stop tokens and after the repetition penalty, in pieces.

        They are neither divided by the temperature nor truncated. Token by token in the order of the rows; models of one vocabulary
        give pieces of the same sizes.
        """
        with autocast_to(self.dtype, batch.input_ids.device):
            states_before, places = self._states_before(batch, states)
        for a, b in pairwise(self._pieces(len(places), batch)):
            with autocast_to(self.dtype, batch.input_ids.device), adapters_enabled(self.lm, on=self.with_adapters):
                logits = apply_head(self.lm, states_before[a:b])
            yield places.piece(a, b).adjust(logits, distribution)

    def export_weights(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Stream this module's weights under the names of its model folder, with adapters merged."""
        return merged_weights(self.lm, ((name.removeprefix("lm."), weight) for name, weight in named))

    def export_adapters(self, named: Iterable[tuple[str, Tensor]], *, with_base: bool) -> Iterator[tuple[str, Tensor]]:
        """Stream this module's adapters for an engine that holds the weights below them, or with_base those too."""
        return separate_weights(
            self.lm, ((name.removeprefix("lm."), weight) for name, weight in named), with_base=with_base
        )

    def _pieces(self, num_tokens: int, batch: TokenBatch) -> list[int]:
        """Bounds of the pieces of the batch's response tokens of which logits are in memory at once.

        Under ZeRO-3 every piece gathers the head, so all ranks need the same number of them; the last ones may be empty.
        """
        limit = MAX_LOGITS if batch.input_ids.device.type == "cpu" else MAX_LOGITS_ON_GPU
        size = max(limit // int(self.lm.config.get_text_config().vocab_size), 1)
        num_pieces = self.max_over_ranks(max(-(-num_tokens // size), 1))
        return [min(piece * size, num_tokens) for piece in range(num_pieces + 1)]

    def _run(self, batch: TokenBatch, **options: Any) -> Any:
        return run_rows(self.lm, batch.input_ids, batch.lengths, pack_limit=self.pack_limit, **options)

    def _states_before(self, batch: TokenBatch, states: Tensor | None) -> tuple[Tensor, Places]:
        """Hidden states [N, H] before each of the N response tokens of the batch, and the place of each."""
        if states is None:
            states = self.trunk(batch)
        with adapters_enabled(self.lm, on=self.with_adapters):
            start = 0 if states is None else self.num_frozen_layers
            router = self._router if torch.is_grad_enabled() else None
            options = {} if router is None else router.options
            output = self._run(batch, start=start, states=states, **options)
            self.router_loss = None if router is None else router(output, batch.attention_mask())
        hidden, mask = output.last_hidden_state, batch.response_mask
        rows = torch.arange(len(batch), device=hidden.device)[:, None]
        steps = torch.arange(mask.shape[1], device=hidden.device).expand_as(mask)[mask]
        places = Places(batch=batch, rows=rows.expand_as(mask)[mask], steps=steps)
        return hidden[rows, batch.state_positions()][mask], places

    def _head(
        self, hidden: Tensor, labels: Tensor, places: Places, distribution: SamplingDistribution, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of one piece. The logits are recomputed in the backward pass to save memory."""

        def head(hidden: Tensor) -> tuple[Tensor, Tensor]:
            logits = distribution.truncate(places.adjust(apply_head(self.lm, hidden), distribution), labels)
            logprobs = token_logprobs(logits, labels, distribution.temperature)
            if not with_entropy:
                return logprobs, torch.zeros_like(logprobs)
            return logprobs, entropy(logits, distribution.temperature)

        if torch.is_grad_enabled():
            return cast(tuple[Tensor, Tensor], checkpoint(head, hidden, use_reentrant=False))
        return head(hidden)
