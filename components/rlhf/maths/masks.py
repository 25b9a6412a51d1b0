"""Masks and positions from known lengths.

They never compare token ids: PAD may equal EOS, a model may have several stop ids, and a prompt may contain EOS.
A row is `prompt | response | padding`.
"""

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True for the first lengths[b] positions of each row. lengths [B] -> [B, width] bool."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def state_positions(prompt_lengths: Tensor, num_actions: int) -> Tensor:
    """Position of the state before each action. prompt_lengths [B] -> [B, T] int64, T = num_actions.

    Action t emits response token t at sequence position prompt_length + t. The hidden state that predicts it, from which
    its value and its log-prob are computed, is one position to the left. This is the same selection as OpenRLHF's
    `[:, :-1]` followed by `[:, -num_actions:]` on left-padded rows (v0.5.5 models/model.py, CriticModel.forward).
    """
    steps = torch.arange(num_actions, device=prompt_lengths.device)
    return prompt_lengths[:, None] - 1 + steps[None, :]


def next_token_mask(prompt_lengths: Tensor, total_lengths: Tensor, width: int) -> Tensor:
    """True at column t when the token at t + 1 is a response token. [B], [B] -> [B, width - 1] bool.

    The action mask of OpenRLHF since v0.8.0 (experience_maker.py `_generate_vllm`), aligned with next-token log-probs.
    """
    columns = torch.arange(1, width, device=prompt_lengths.device)[None, :]
    return (columns >= prompt_lengths[:, None]) & (columns < total_lengths[:, None])
