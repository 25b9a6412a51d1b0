"""Masks and log-probs of each source, composed of the functions in components/rlhf/maths."""

from typing import Any

import torch
from torch import Tensor

from components.rlhf.maths.logprobs import token_logprobs
from components.rlhf.maths.masks import length_mask, next_token_mask, state_positions
from tests.golden.cases import Case


def logprobs(case: Case) -> dict[str, Any]:
    temperature = case.params.get("temperature")
    temperature = 1.0 if temperature is None else temperature + case.params.get("temperature_eps", 0.0)
    if "sequences" in case.inputs:
        return aligned_logprobs(case, temperature)
    return {"logp": token_logprobs(case.floats("logits"), case.ints("labels"), temperature)}


def aligned_logprobs(case: Case, temperature: float) -> dict[str, Any]:
    """The last num_actions tokens (v0.5.5), or every token but the first times the action mask (HEAD)."""
    sequences, logits, attention = case.ints("sequences"), case.floats("logits"), case.ints("attention_mask")
    batch, width = sequences.shape
    num_actions = case.params.get("num_actions", width - 1)
    states = state_positions(torch.full((batch,), width - num_actions), num_actions)
    state_logits = logits.gather(1, states[:, :, None].expand(-1, -1, logits.shape[-1]))
    logp = token_logprobs(state_logits, sequences.gather(1, states + 1), temperature)
    if "action_mask" in case.inputs:
        logp = torch.where(case.mask("action_mask"), logp, 0)
    position_ids = torch.where(attention == 1, attention.cumsum(dim=1) - 1, 1)
    return {"action_log_probs": logp, "position_ids": position_ids}


def masks(case: Case) -> dict[str, Any]:
    if case.origin == "verl":
        case.params.ignore("pad_id")
        return {"mask": length_mask(until_eos(case), case.ints("responses_in").shape[1])}
    if case.origin == "trl":
        return trl_masks(case)
    if "observation_tokens" in case.inputs:
        return turn_masks(case)
    return length_masks(case)


def until_eos(case: Case) -> Tensor:
    """Number of tokens up to and including the first EOS, or the row width without one: [B]."""
    return until_first(case.ints("responses_in"), case.params["eos_id"], inclusive=True)


def until_first(ids: Tensor, token: int, *, inclusive: bool) -> Tensor:
    width = ids.shape[1]
    columns = torch.arange(width)
    first = torch.where(ids == token, columns, width).amin(dim=1)
    return (first + inclusive).clamp(max=width)


def trl_masks(case: Case) -> dict[str, Any]:
    """Truncate after the first EOS; the tokens before the first PAD are real."""
    eos, pad = case.params["eos_id"], case.params["pad_id"]
    responses = case.ints("responses_in")
    width = responses.shape[1]
    responses = torch.where(length_mask(until_eos(case), width), responses, pad)
    lengths = until_first(responses, pad, inclusive=False)
    return {
        "postprocessed_responses": responses,
        "sequence_lengths": lengths - 1,
        "mask": length_mask(lengths, width),
        "mask_p1": length_mask(lengths + 1, width),
        "contain_eos": (responses == eos).any(dim=1),
    }


def length_masks(case: Case) -> dict[str, Any]:
    """OpenRLHF since v0.8.0: prompt and response adjacent, padding on the right, masks from lengths."""
    case.params.ignore("eos_id")  # not used
    pad, max_len = case.params["pad_id"], case.params.get("max_len")
    prompts = case.inputs["prompts"]
    rows = [(prompt + response)[:max_len] for prompt, response in zip(prompts, case.inputs["responses"], strict=True)]
    width = max(len(row) for row in rows)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    total_lengths = torch.tensor([len(row) for row in rows])
    attention = length_mask(total_lengths, width)
    actions = next_token_mask(prompt_lengths, total_lengths, width)
    return {
        "sequences": [torch.tensor(row + [pad] * (width - len(row))) for row in rows],
        "attention_mask": attention,
        "action_mask": actions,
        "response_length": actions.sum(dim=1),
        "total_length": attention.sum(dim=1),
        "truncated": ~case.mask("finished"),
    }


def turn_masks(case: Case) -> dict[str, Any]:
    """One conversation of several turns: every action range is a response to the tokens before it."""
    max_len = case.params["max_len"]
    tokens = case.inputs["observation_tokens"][:max_len]
    width = len(tokens)
    actions = torch.zeros(1, width - 1, dtype=torch.bool)
    for start, end in case.inputs["action_ranges"]:
        actions |= next_token_mask(torch.tensor([start]), torch.tensor([end]), width)
    columns = actions[0].nonzero()
    return {
        "sequences": [torch.tensor(tokens)],
        "attention_mask": length_mask(torch.tensor([width]), width),
        "action_mask": actions,
        "response_length": (columns.max() - columns.min() + 1)[None] if len(columns) else torch.zeros(1),
        "total_length": [torch.tensor(width)],
        "length_clipped": [torch.tensor(width >= max_len)],
    }
