"""Rollouts with transformers in this process: the engine of laptops and of tests."""

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
    """Samples from its own copy of the model, which may be in a smaller precision than the trained one."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, stop_ids: tuple[int, ...]) -> None:
        """model is this engine's alone: a causal language model in the precision to sample in."""
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
        # One uniform number a token, from a generator of the row's own: the same seed gives the same draws in any batch.
        draws = torch.stack(
            [torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(device)
        distribution = SamplingDistribution(
            temperature=sampling.temperature, min_new_tokens=sampling.min_new_tokens, stop_ids=self.stop_ids
        )
        tokens, mask = _left_pad(prompt_ids, device)
        alive = torch.arange(len(prompts), device=device)  # rows of the batch that have not stopped
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        stops = torch.tensor(self.stop_ids, device=device)
        cache = DynamicCache(config=self.model.config)
        for step in range(sampling.max_new_tokens):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            hidden = self.model.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            # The last column as a matrix of its own: the head on a strided slice would copy its weights once a row.
            logits = self.model.get_output_embeddings()(hidden[:, -1].contiguous())
            steps = torch.full((len(alive),), step, device=device)
            logits = distribution.mask_early_stops(logits.float(), steps) / sampling.temperature
            chosen, chosen_logprobs = _sample(logits, draws[alive, step])
            for row, token, logprob in zip(alive.tolist(), chosen.tolist(), chosen_logprobs.tolist(), strict=True):
                responses[row].append(token)
                logprobs[row].append(logprob)
            unfinished = ~torch.isin(chosen, stops)
            if not unfinished.all():  # rows that stopped cost nothing from here on
                keep = unfinished.nonzero().squeeze(1)
                alive, chosen, mask = alive[keep], chosen[keep], mask[keep]
                cache.batch_select_indices(keep)
            if len(alive) == 0:
                break
            tokens = chosen[:, None]
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
    """Ids and attention mask [B, P] int64, prompts flush right, so that every row's next token is at the same column."""
    width = max(len(ids) for ids in prompt_ids)
    tokens = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
    mask = torch.zeros(len(prompt_ids), width, dtype=torch.int64)
    for row, ids in enumerate(prompt_ids):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens.to(device), mask.to(device)


def _sample(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverse transform sampling, with its log-prob. logits [B, V], uniforms [B] in [0, 1) -> [B], [B].

    One uniform number a row instead of one exponential variate a vocabulary entry, which torch draws serially on CPU.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    targets = uniforms.double() * cumulative[:, -1]  # the sum is 1 only up to rounding
    # right=True: a draw of exactly 0 must not choose an impossible first token.
    chosen = torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return chosen, logprobs.gather(1, chosen[:, None]).squeeze(1)
