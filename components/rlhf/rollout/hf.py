"""Rollouts with transformers, in the training process."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import decode_response
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.packing import attends_by_position
from components.rlhf.rollout.contexts import encode_contexts
from components.rlhf.rollout.controls import Controls
from components.rlhf.rollout.decoding import Decoding
from components.rlhf.rollout.probe import WeightSample
from components.rlhf.rollout.stopping import ResponseText

BLOCK = 256  # tokens of the vocabulary

Sample = tuple[list[int], list[float]]  # ids of a response, and the log-prob of each


class HfRolloutEngine:
    """Samples from its own copy of the model, which may have a lower precision, or from the trained model itself."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, stop_ids: tuple[int, ...]) -> None:
        """model is a causal language model in the precision to sample in. If it is the trained one, sync() has nothing to copy."""
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.name = f"transformers {version('transformers')}"
        self.version = 0
        self.merges_because = "transformers samples from merged weights"
        self._parameters = dict(model.named_parameters())

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        after: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        prompt_ids = encode_contexts(self.tokenizer, prompts, after)
        texts = [ResponseText(self.tokenizer, ids, sampling) for ids in prompt_ids] if sampling.stop else []
        samples = sample(
            self.model, prompt_ids, sampling, seeds, stop_ids=self.stop_ids, texts=texts, greedy=greedy, limits=limits
        )
        completions = []
        for row, (prompt, ids, (response, logprobs)) in enumerate(zip(prompts, prompt_ids, samples, strict=True)):
            is_stopped = bool(texts) and texts[row].stopped
            completions.append(
                Completion(
                    prompt=prompt,
                    prompt_ids=ids,
                    response_ids=response,
                    response=texts[row].text if is_stopped else decode_response(self.tokenizer, ids, response),
                    logprobs=torch.tensor(logprobs),
                    truncated=not is_stopped and response[-1] not in self.stop_ids,
                    weight_version=self.version,
                )
            )
        return completions

    def load(self, folder: Path) -> int:
        dtype, device = self.model.dtype, self.model.device
        self.model, self._parameters = None, {}  # before the other model is loaded
        self.model = load_causal_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False, device=device)
        self._parameters = dict(self.model.named_parameters())
        self.version += 1
        return self.version

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
        self.model, self._parameters = None, {}


@torch.inference_mode()
def sample(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    *,
    stop_ids: tuple[int, ...],
    texts: Sequence[ResponseText] = (),
    greedy: bool = False,
    limits: Sequence[int] | None = None,
) -> list[Sample]:
    """One response to each prompt. It depends on its prompt, its seed and the weights, not on the rest of the batch.

    texts, one per prompt, decode the responses and end them at stop strings; without texts only stop ids do. limits are the maximum
    lengths of the responses; None is max_new_tokens for all.
    """
    limits = [sampling.max_new_tokens] * len(prompt_ids) if limits is None else limits
    samples: dict[int, Sample] = {}
    for rows in _batches(prompt_ids, sampling.batch_size, allows_padding=attends_by_position(model)):
        prompts = [prompt_ids[row] for row in rows]
        batch = _sample_batch(
            model,
            prompts,
            sampling,
            [seeds[row] for row in rows],
            stop_ids,
            texts=[texts[row] for row in rows] if texts else None,
            greedy=greedy,
            limits=[limits[row] for row in rows],
        )
        samples |= zip(rows, batch, strict=True)
    return [samples[row] for row in range(len(prompt_ids))]


def _batches(prompt_ids: Sequence[Sequence[int]], size: int, *, allows_padding: bool) -> Iterator[list[int]]:
    """The rows in batches of similar length, for little padding, with equal prompts together; longest first.

    Without padding the prompts of a batch have the same length.
    """
    rows = sorted(range(len(prompt_ids)), key=lambda row: (len(prompt_ids[row]), tuple(prompt_ids[row])), reverse=True)
    for _, group in groupby(rows, key=lambda row: 0 if allows_padding else len(prompt_ids[row])):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _sample_batch(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seeds: Sequence[int],
    stop_ids: tuple[int, ...],
    *,
    texts: Sequence[ResponseText] | None,
    greedy: bool,
    limits: Sequence[int],
) -> list[Sample]:
    device, size = model.device, (len(prompt_ids), sampling.max_new_tokens)
    # One uniform number per token from a generator per row: the same seed gives the same draws in any batch.
    uniforms = torch.stack([torch.rand(size[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    uniforms = uniforms.to(device)
    responses, logprobs = torch.zeros(size, dtype=torch.int64, device=device), torch.zeros(size, device=device)
    longest = torch.tensor(limits, device=device)
    lengths = longest.clone()
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)
    active = torch.arange(len(prompt_ids), device=device)  # rows of the batch that have not stopped
    controls, decoding = Controls(sampling, prompt_ids), Decoding(model, prompt_ids)
    for step in range(max(limits)):
        logits = decoding.advance().float()
        if step < sampling.min_new_tokens:
            logits[:, stops] = float("-inf")
        logits = controls.penalize(logits, active)
        if greedy:
            chosen, tokens = torch.log_softmax(logits, dim=-1).max(dim=-1)
        else:
            tokens, chosen = _draw(controls.truncate(logits.div_(sampling.temperature)), uniforms[active, step])
        responses[active, step], logprobs[active, step] = tokens, chosen
        controls.observe(tokens, active)
        finished, kept = torch.isin(tokens, stops), None
        if texts is not None:
            finished |= _completes_stop(texts, active, tokens, finished)
        finished |= longest[active] == step + 1
        if finished.any():
            lengths[active[finished]] = step + 1
            kept = _unfinished(finished)
            active = active[kept]
        if len(active) == 0:
            break
        decoding.append(tokens, kept)
    return [
        (ids[:length], values[:length])
        for ids, values, length in zip(responses.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    ]


def _completes_stop(texts: Sequence[ResponseText], active: Tensor, tokens: Tensor, finished: Tensor) -> Tensor:
    """Whether each token [B] completes a stop string in the text of its row; a stop token has no text."""
    rows = zip(active.tolist(), tokens.tolist(), finished.tolist(), strict=True)
    return torch.tensor(
        [not is_end and texts[row].append(token) for row, token, is_end in rows], device=finished.device
    )


def _unfinished(finished: Tensor) -> Tensor:
    """Indices of the rows that go on, in an order that moves few of them: the last ones take the places of finished ones."""
    count = int((~finished).sum())
    rows = torch.arange(count, device=finished.device)
    rows[finished[:count]] = count + (~finished[count:]).nonzero().squeeze(1)
    return rows


def _draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: one token per row, and its log-prob. logits [B, V], uniforms [B] in [0, 1) -> [B], [B].

    It needs one uniform number per row instead of one exponential variate per token, which torch draws serially on CPU. The
    cumulative sums, which need double precision, are those of blocks of tokens, and then those of the tokens of one block.
    """
    probabilities = torch.softmax(logits, dim=-1)
    padding = -logits.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(probabilities, (0, padding)) if padding else probabilities
    blocks = blocks.view(len(logits), -1, BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = uniforms.double() * sums[:, -1]  # the sum is 1 only up to rounding
    # right=True, so that a draw of exactly 0 does not select a first block or token of probability 0.
    # With nan nothing is found; the last token is taken, and the loss then says what is wrong.
    block = torch.searchsorted(sums, targets[:, None], right=True).clamp(max=sums.shape[1] - 1)
    before = torch.nn.functional.pad(sums, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    # The sums of blocks and tokens round differently; at the end of a block that must not select a token of probability 0.
    rest = torch.minimum(targets[:, None] - before, inside[:, -1:].nextafter(torch.zeros_like(before)))
    sampled = (block * BLOCK + torch.searchsorted(inside, rest, right=True)).clamp(max=logits.shape[1] - 1)
    return sampled.squeeze(1), probabilities.gather(1, sampled).squeeze(1).log()
