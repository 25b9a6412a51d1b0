"""Rollouts with transformers, in the training process."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, Prompt, is_chat
from components.rlhf.data.tokenizer import decode_response, encode_prompt
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.models.layers import apply_head
from components.rlhf.rollout.decoding import Decoding, allows_padding
from components.rlhf.rollout.probe import WeightSample

Sample = tuple[list[int], list[float]]  # ids of a response, and the log-prob of each


class HfRolloutEngine:
    """Samples from its own copy of the model, which may have a lower precision, or from the trained model itself."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, stop_ids: tuple[int, ...]) -> None:
        """model is a causal language model in the precision to sample in. If it is the trained one, sync() has nothing to copy."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.name = f"transformers {version('transformers')}"
        self.version = 0
        self._parameters = dict(model.named_parameters())

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int]) -> list[Completion]:
        prompt_ids = [encode_prompt(self.tokenizer, prompt.prompt, is_chat=is_chat(prompt)) for prompt in prompts]
        samples = sample(self.model, prompt_ids, sampling, seeds, stop_ids=self.stop_ids)
        return [
            Completion(
                prompt=prompt,
                prompt_ids=ids,
                response_ids=response,
                response=decode_response(self.tokenizer, ids, response),
                logprobs=torch.tensor(logprobs),
                truncated=response[-1] not in self.stop_ids,
                weight_version=self.version,
            )
            for prompt, ids, (response, logprobs) in zip(prompts, prompt_ids, samples, strict=True)
        ]

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        with torch.no_grad():
            for name, weight in weights:
                if self._parameters[name].data_ptr() != weight.data_ptr():
                    self._parameters[name].copy_(weight)
        self.version += 1
        return self.version

    def weight_samples(self) -> dict[str, WeightSample]:
        return {name: WeightSample.of(weight) for name, weight in self._parameters.items()}

    @torch.inference_mode()
    def prompt_logprobs(self, ids: Sequence[int]) -> Tensor:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[0, 1:, None]).squeeze(1).cpu()

    def close(self) -> None:
        del self.model


@torch.inference_mode()
def sample(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    *,
    stop_ids: tuple[int, ...],
) -> list[Sample]:
    """One response to each prompt. It depends on its prompt, its seed and the weights, not on the rest of the batch."""
    groups = [list(range(len(prompt_ids)))]
    if not allows_padding(model):  # then a batch takes prompts of equal length only
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, ids in enumerate(prompt_ids):
            by_length[len(ids)].append(row)
        groups = list(by_length.values())
    samples: dict[int, Sample] = {}
    for group in groups:
        for start in range(0, len(group), sampling.batch_size):
            rows = group[start : start + sampling.batch_size]
            batch = _sample_batch(
                model, [prompt_ids[row] for row in rows], sampling, [seeds[row] for row in rows], stop_ids
            )
            samples |= zip(rows, batch, strict=True)
    return [samples[row] for row in range(len(prompt_ids))]


def _sample_batch(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    stop_ids: tuple[int, ...],
) -> list[Sample]:
    device = model.device
    # One uniform number per token from a generator per row: the same seed gives the same draws in any batch.
    uniforms = torch.stack(
        [torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(device)
    distribution = SamplingDistribution(
        temperature=sampling.temperature, min_new_tokens=sampling.min_new_tokens, stop_ids=stop_ids
    )
    active = torch.arange(len(prompt_ids), device=device)  # rows of the batch that have not stopped
    samples: list[Sample] = [([], []) for _ in prompt_ids]
    stops = torch.tensor(stop_ids, device=device)
    decoding = Decoding(model, prompt_ids)
    for step in range(sampling.max_new_tokens):
        logits = apply_head(model, decoding.advance())
        steps = torch.full((len(active),), step, device=device)
        logits = distribution.mask_early_stops(logits.float(), steps) / sampling.temperature
        tokens, logprobs = _draw(logits, uniforms[active, step])
        for row, token, logprob in zip(active.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            samples[row][0].append(token)
            samples[row][1].append(logprob)
        unfinished = ~torch.isin(tokens, stops)
        kept = None if unfinished.all() else unfinished.nonzero().squeeze(1)  # finished rows leave the batch
        if kept is not None:
            active = active[kept]
        if len(active) == 0 or step + 1 == sampling.max_new_tokens:
            break
        decoding.append(tokens, kept)
    return samples


def _draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: one token per row, and its log-prob. logits [B, V], uniforms [B] in [0, 1) -> [B], [B].

    It needs one uniform number per row instead of one exponential variate per token, which torch draws serially on CPU.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    targets = uniforms.double() * cumulative[:, -1]  # the sum is 1 only up to rounding
    # right=True, so that a draw of exactly 0 does not select a first token of probability 0.
    sampled = torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return sampled, logprobs.gather(1, sampled[:, None]).squeeze(1)
