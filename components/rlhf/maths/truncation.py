"""What sampling controls make of logits: the repetition penalty, and the tokens that min-p, top-k and top-p keep.

Order and definitions are those of vLLM 0.32 (v1/sample/sampler.py): the penalty, the temperature, min-p, top-k, top-p. Each of the
three keeps the tokens that are at least as probable as some token, so that tokens of equal probability are kept or dropped together;
vLLM drops part of them at the bound of top-p, and on a GPU of top-k.
"""

import torch
from torch import Tensor

from components.rlhf.maths.logprobs import at_temperature, cached_rows

# Sorting a whole vocabulary takes longer than the model's head, and few tokens nearly always contain the nucleus: numbers to look at.
CANDIDATES = (256, 8192)


def kept_tokens(
    logits: Tensor, temperature: float = 1.0, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Whether softmax(logits / temperature) keeps each token: [N, V] -> [N, V] bool, at least one per row.

    min_p keeps tokens of at least min_p times the largest probability (Nguyen et al. 2024). top_k keeps the k most probable ones of
    them (Fan et al. 2018), 0 all. top_p keeps the smallest number of most probable ones whose share of what is left then is at least
    top_p (nucleus sampling, Holtzman et al. 2019). Impossible tokens (-inf) are never kept.
    """
    kept = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    for rows in cached_rows(logits):
        kept[rows] = _kept(at_temperature(logits[rows], temperature), top_k, top_p, min_p)
    return kept


def keep_only(logits: Tensor, kept: Tensor, labels: Tensor) -> Tensor:
    """logits [N, V] with -inf where neither kept [N, V] nor the label [N] of the row is: a sampled token always remains.

    The kept tokens are constants for the gradient, which is that of the renormalized probabilities.
    """
    return logits.masked_fill(~kept.scatter(-1, labels[:, None], True), float("-inf"))


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [N, V], where seen [N, V] divided by the penalty if positive and multiplied by it otherwise (Keskar et al. 2019, CTRL)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_tokens(ids: Tensor, lengths: Tensor, vocabulary: int) -> Tensor:
    """Whether each token of the vocabulary is one of the first lengths [N] ids [N, S] of its row: [N, V] bool."""
    beyond = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
    seen = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
    return seen.scatter_(1, ids.masked_fill(beyond, vocabulary), True)[:, :vocabulary]


def _kept(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    kept = ~logits.isneginf()
    if min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        kept &= probabilities >= min_p * probabilities.amax(dim=-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        kept &= logits >= logits.topk(top_k).values[:, -1:]
    if top_p < 1:
        candidates = (top_k,) if top_k else CANDIDATES
        kept &= logits >= _nucleus_bound(logits.masked_fill(~kept, float("-inf")), top_p, candidates)
    return kept


def _nucleus_bound(logits: Tensor, top_p: float, candidates: tuple[int, ...]) -> Tensor:
    """The logit [N, 1] of the least probable token of the nucleus of each row, looked for among so many tokens, and then among all."""
    top = logits.amax(dim=-1, keepdim=True)
    total = (logits - top).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
    bound, size = torch.empty_like(top), logits.shape[-1]
    rows = torch.arange(len(logits), device=logits.device)  # whose nucleus is not found yet
    for number in (*(number for number in candidates if number < size), size):
        best = logits[rows].topk(number).values
        masses = (best - top[rows]).exp_().double().cumsum_(dim=-1).div_(total[rows])
        # A token belongs to the nucleus if those before it do not reach top_p; the first one always does.
        last = (masses < top_p).sum(dim=-1, keepdim=True).clamp(max=number - 1)
        bound[rows] = best.gather(1, last)
        rows = rows[masses[:, -1] < top_p]
        if len(rows) == 0:
            break
    return bound
