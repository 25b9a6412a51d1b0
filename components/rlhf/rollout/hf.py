"""Rollouts with transformers, in the training process."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import encode_prompt
from components.rlhf.models.actor import SamplingDistribution


class HfRolloutEngine:
    """Samples from its own copy of the model, which may have a lower precision than the trained one."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, stop_ids: tuple[int, ...]) -> None:
        """model is a causal language model in the precision to sample in; the engine must not share it."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.name = f"transformers {version('transformers')}"
        self.version = 0
        self._parameters = dict(model.named_parameters())

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int]) -> list[Completion]:
        completions: list[Completion] = []
        for start in range(0, len(prompts), sampling.batch_size):
            stop = start + sampling.batch_size
            completions += self._generate_batch(prompts[start:stop], sampling, seeds[start:stop])
        return completions

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        with torch.no_grad():
            for name, weight in weights:
                self._parameters[name].copy_(weight)
        self.version += 1
        return self.version

    @torch.inference_mode()
    def prompt_logprobs(self, ids: Sequence[int]) -> Tensor:
        tokens = torch.tensor([list(ids)], device=self.model.device)
        logits = self.model(input_ids=tokens, use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[0, 1:, None]).squeeze(1).cpu()

    def close(self) -> None:
        del self.model

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        prompt_ids = [encode_prompt(self.tokenizer, prompt.prompt) for prompt in prompts]
        device = self.model.device
        # One uniform number per token from a generator per row: the same seed gives the same draws in any batch.
        uniforms = torch.stack(
            [torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(device)
        distribution = SamplingDistribution(
            temperature=sampling.temperature, min_new_tokens=sampling.min_new_tokens, stop_ids=self.stop_ids
        )
        tokens, mask = _left_pad(prompt_ids, device)
        active = torch.arange(len(prompts), device=device)  # rows of the batch that have not stopped
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        stops = torch.tensor(self.stop_ids, device=device)
        cache = DynamicCache(config=self.model.config)
        for step in range(sampling.max_new_tokens):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            hidden = self.model.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            # Contiguous, because on a strided slice the head would copy its weights once per row.
            logits = self.model.get_output_embeddings()(hidden[:, -1].contiguous())
            steps = torch.full((len(active),), step, device=device)
            logits = distribution.mask_early_stops(logits.float(), steps) / sampling.temperature
            sampled, sampled_logprobs = _sample(logits, uniforms[active, step])
            for row, token, logprob in zip(active.tolist(), sampled.tolist(), sampled_logprobs.tolist(), strict=True):
                responses[row].append(token)
                logprobs[row].append(logprob)
            unfinished = ~torch.isin(sampled, stops)
            if not unfinished.all():  # drop finished rows from the batch
                kept = unfinished.nonzero().squeeze(1)
                active, sampled, mask = active[kept], sampled[kept], mask[kept]
                cache.batch_select_indices(kept)
            if len(active) == 0:
                break
            tokens = sampled[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        return [
            Completion(
                prompt=prompt,
                prompt_ids=ids,
                response_ids=response,
                response=str(self.tokenizer.decode(response, skip_special_tokens=True)),
                logprobs=torch.tensor(row_logprobs),
                truncated=response[-1] not in self.stop_ids,
                weight_version=self.version,
            )
            for prompt, ids, response, row_logprobs in zip(prompts, prompt_ids, responses, logprobs, strict=True)
        ]


def _left_pad(prompt_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, P] int64, padded on the left, so that the next token of every row is in the same column."""
    width = max(len(ids) for ids in prompt_ids)
    tokens = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
    mask = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
    for row, ids in enumerate(prompt_ids):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens.to(device), mask.to(device)


def _sample(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: one token per row, and its log-prob. logits [B, V], uniforms [B] in [0, 1) -> [B], [B].

    It needs one uniform number per row instead of one exponential variate per token, which torch draws serially on CPU.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    targets = uniforms.double() * cumulative[:, -1]  # the sum is 1 only up to rounding
    # right=True, so that a draw of exactly 0 does not select a first token of probability 0.
    sampled = torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return sampled, logprobs.gather(1, sampled[:, None]).squeeze(1)
