"""Right-padded batches of `prompt | response`, and the order in which records are trained on."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.rlhf.data.records import Completion
from components.rlhf.maths.masks import length_mask, state_positions


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """B rows of `prompt | response | padding`. S is the longest row, T the longest response.

    Padding is on the right, where causal attention cannot see it, so no attention mask is needed for exact results.

    Example, two rows of prompts [5, 6] and [7] with responses [8, 2] and [9, 9, 2]:
        input_ids      [[5, 6, 8, 2], [7, 9, 9, 2]]
        response_ids   [[8, 2, 0], [9, 9, 2]]
        response_mask  [[1, 1, 0], [1, 1, 1]]
    """

    input_ids: Tensor  # [B, S] int64
    prompt_lengths: Tensor  # [B] int64
    response_ids: Tensor  # [B, T] int64, 0 at padding
    response_mask: Tensor  # [B, T] bool, True = token of an answer, including its end; padding and the turns between answers are False
    lengths: Tensor  # [B] int64, real tokens of each row: prompt and response

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def response_lengths(self) -> Tensor:  # [B] int64, with the turns between answers
        return self.lengths - self.prompt_lengths

    def state_positions(self) -> Tensor:
        """Sequence position of the state before each action, clamped to the row width at padding: [B, T] int64."""
        positions = state_positions(self.prompt_lengths, self.response_ids.shape[1])
        return positions.clamp(max=self.input_ids.shape[1] - 1)

    def attention_mask(self) -> Tensor:
        """True at real tokens: [B, S] bool."""
        return length_mask(self.lengths, self.input_ids.shape[1])

    def last_positions(self) -> Tensor:
        """Sequence position of the last real token of each row: [B] int64."""
        return self.lengths - 1

    def select(self, rows: Tensor) -> "TokenBatch":
        """The given rows (indices [b] int64), no wider than the longest of them needs."""
        lengths, prompt_lengths = self.lengths[rows], self.prompt_lengths[rows]
        width, num_actions = int(lengths.max()), max(int((lengths - prompt_lengths).max()), 1)
        return TokenBatch(
            input_ids=self.input_ids[rows, :width],
            prompt_lengths=prompt_lengths,
            response_ids=self.response_ids[rows, :num_actions],
            response_mask=self.response_mask[rows, :num_actions],
            lengths=lengths,
        )

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(
            input_ids=self.input_ids.to(device),
            prompt_lengths=self.prompt_lengths.to(device),
            response_ids=self.response_ids.to(device),
            response_mask=self.response_mask.to(device),
            lengths=self.lengths.to(device),
        )


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool] | None] | None = None,
) -> TokenBatch:
    """Pad B prompts and their responses (ids) into one batch. Each prompt has at least one token.

    masks say which tokens of each response belong to answers of the model; None, for all responses or one, is all of its tokens.
    """
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    response_lengths = torch.tensor([len(r) for r in responses])
    if (prompt_lengths == 0).any():
        raise ValueError("a prompt has no tokens; the first response token needs at least one token before it")
    width, num_actions = int((prompt_lengths + response_lengths).max()), max(int(response_lengths.max()), 1)
    # The pad id is always 0, independent of the tokenizer: masks come from lengths, so no id is special.
    input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    response_ids = torch.zeros(len(prompts), num_actions, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        response_ids[row, : len(response)] = torch.tensor(response, dtype=torch.int64)
    response_mask = length_mask(response_lengths, num_actions)
    for row, mask in enumerate(masks or ()):
        if mask is not None:
            response_mask[row, : len(mask)] = torch.tensor(mask, dtype=torch.bool)
    return TokenBatch(
        input_ids=input_ids,
        prompt_lengths=prompt_lengths,
        response_ids=response_ids,
        response_mask=response_mask,
        lengths=prompt_lengths + response_lengths,
    )


def collate_completions(completions: Sequence[Completion]) -> TokenBatch:
    """collate() of responses: the tokens of an environment are in the sequence, where attention sees them, but not in the mask."""
    return collate(
        [c.prompt_ids for c in completions],
        [c.response_ids for c in completions],
        [c.response_mask for c in completions],
    )


def epoch_order(size: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(size) that depends only on seed and epoch, so that a resumed run continues with the same order."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def stream_slice(count: int, start: int, size: int, *, seed: int) -> list[int]:
    """The indices at positions start to start + size of an endless stream of shuffled epochs of range(count)."""
    positions = range(start, start + size)
    epochs = range(positions[0] // count, positions[-1] // count + 1)
    orders = {epoch: epoch_order(count, seed=seed, epoch=epoch) for epoch in epochs}
    return [orders[position // count][position % count] for position in positions]


def step_batches(size: int, batch_size: int, *, seed: int, num_epochs: int, max_steps: int) -> Iterator[list[int]]:
    """Yield the row indices of each optimizer step, shuffled every epoch; an epoch's last batch may be short. max_steps 0: no limit."""
    step = 0
    for epoch in range(num_epochs):
        order = epoch_order(size, seed=seed, epoch=epoch)
        for start in range(0, size, batch_size):
            if max_steps and step == max_steps:
                return
            yield order[start : start + batch_size]
            step += 1
