"""Small models and batches."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.models.actor import Actor
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm
from components.rlhf.models.scalar import ScalarModel

# Prompts and responses of different lengths; 0, EOS and PAD of the tiny tokenizer, is also inside prompts and responses.
PROMPTS = [[5, 6, 7], [8], [9, 0, 11, 12, 13], [40, 41]]
RESPONSES = [[3, 4, 0], [101, 0, 103, 104, 105, 106, 107], [7], [20, 21, 22, 23]]


def batch() -> TokenBatch:
    return collate(PROMPTS, RESPONSES)


def actor_of(folder: Path, *, frozen: int = 0, dtype: torch.dtype = torch.float32) -> Actor:
    lm = load_causal_lm(folder, num_frozen_layers=frozen, dtype=dtype)
    return Actor(lm, num_frozen_layers=frozen, dtype=dtype)


def scalar_of(folder: Path, *, frozen: int = 0, seed: int = 0, **options: Any) -> ScalarModel:
    """A scalar model with a head scaled up so that scores differ clearly."""
    lm = load_scalar_lm(folder, num_frozen_layers=frozen, dtype=torch.float32, seed=seed)
    with torch.no_grad():
        lm.score.weight.mul_(30)
    return ScalarModel(lm, num_frozen_layers=frozen, dtype=torch.float32, **options)


def rows_of(tensor: Tensor, lengths: list[int]) -> list[list[float]]:
    """Each row of a padded [B, T] without its padding."""
    return [row[:length] for row, length in zip(tensor.tolist(), lengths, strict=True)]


def trained_names(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
