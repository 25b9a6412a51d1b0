"""Log-probabilities of chosen tokens under the sampling distribution."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CACHED = 2**18  # logits that a processor core keeps in its cache: 1 MiB in fp32


def token_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at labels. logits [..., V], labels [...] -> [...] in fp32 (fp64 stays fp64).

    The softmax is never computed in bf16, whose rounding alone moves a tenth of all ratios out of the clip range.
    Equal to OpenRLHF 3c3be623 models/utils.py `log_probs_from_logits`.
    """
    flat: Tensor = _TokenLogprobs.apply(logits.flatten(0, -2), labels.flatten(), temperature)  # type: ignore[no-untyped-call]
    return flat.view(labels.shape)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature). logits [..., V] -> [...]."""
    flat: Tensor = _Entropy.apply(logits.flatten(0, -2), temperature)  # type: ignore[no-untyped-call]
    return flat.view(logits.shape[:-1])


class _TokenLogprobs(torch.autograd.Function):
    """The gradient is computed from the log-probs in place: (one-hot - softmax) / temperature.

    On a CPU every step runs on a few rows at a time, which stay in the cache; torch's own operations would move all logits
    through main memory a dozen times.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        chosen = torch.empty(len(logits), dtype=_precision(logits), device=logits.device)
        kept = []
        for rows in cached_rows(logits):
            logprobs = _log_softmax(logits[rows], temperature)
            chosen[rows] = logprobs.gather(-1, labels[rows, None]).squeeze(-1)
            kept += [logprobs] if ctx.needs_input_grad[0] else []
        ctx.save_for_backward(labels, *kept)
        ctx.temperature, ctx.shape, ctx.dtype = temperature, logits.shape, logits.dtype
        return chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        labels, *kept = ctx.saved_tensors
        scale, done = (gradient / ctx.temperature)[:, None], 0
        result = torch.empty(ctx.shape, dtype=ctx.dtype, device=labels.device)
        for logprobs in kept:
            rows = slice(done, done + len(logprobs))
            # In place, so another backward pass through the same logits is an error, not a wrong gradient.
            result[rows] = logprobs.exp_().mul_(-scale[rows]).scatter_add_(-1, labels[rows, None], scale[rows])
            done += len(logprobs)
        return result, None, None


class _Entropy(torch.autograd.Function):
    """The gradient is computed from the log-probs in place: -softmax * (log-softmax + entropy) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        found = torch.empty(len(logits), dtype=_precision(logits), device=logits.device)
        kept = []
        for rows in cached_rows(logits):
            logprobs = _log_softmax(logits[rows], temperature)
            # A masked token has log-probability -inf: its term must be 0, not nan.
            found[rows] = -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0)).sum(-1)
            kept += [logprobs] if ctx.needs_input_grad[0] else []
        ctx.save_for_backward(found, *kept)
        ctx.temperature, ctx.shape, ctx.dtype = temperature, logits.shape, logits.dtype
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found, *kept = ctx.saved_tensors
        scale, done = (-gradient / ctx.temperature)[:, None], 0
        result = torch.empty(ctx.shape, dtype=ctx.dtype, device=found.device)
        for logprobs in kept:
            rows = slice(done, done + len(logprobs))
            probabilities = logprobs.exp()
            # In place, as above.
            logprobs.masked_fill_(logprobs.isneginf(), 0).add_(found[rows, None])
            result[rows] = logprobs.mul_(probabilities).mul_(scale[rows])
            done += len(logprobs)
        return result, None


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in the precision of log-probs: fp32, or fp64 as they are."""
    logits = logits.to(_precision(logits))
    return logits if temperature == 1.0 else logits / temperature


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(at_temperature(logits, temperature), dim=-1)


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def cached_rows(logits: Tensor) -> Iterator[slice]:
    """Slices of rows [n, V] that fit into the cache of a CPU; on other devices all rows at once."""
    size = max(CACHED // logits.shape[-1], 1) if logits.device.type == "cpu" else max(len(logits), 1)
    yield from (slice(start, start + size) for start in range(0, len(logits), size))
