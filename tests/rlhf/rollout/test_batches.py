"""Batches of the transformers engine: prompts sorted by length, and computed once for all their samples, in any architecture.

Expected values come from one text at a time, without a cache and without padding.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rlhf.config.model import SamplingConfig
from components.rlhf.models.layers import decoder_of
from components.rlhf.models.packing import attends_by_position
from components.rlhf.rollout.decoding import Decoding
from components.rlhf.rollout.hf import _draw, _unfinished, sample
from tests.support.tiny_models import VOCAB_SIZE, tiny_model

KINDS = (
    "llama",
    "gemma2",  # every other layer with a sliding window
    "gpt_oss",  # attention sinks
    "deepseek_v3",  # latent attention, experts
    "gpt2",  # learned positions
    "bloom",  # no position_ids, so equal lengths only
    "llama4_text",  # chunked attention
    "falcon_h1",  # attention and a state-space model in every layer
    "lfm2",  # convolutions
    "qwen3_next",  # linear attention
    "mamba",
    "xlstm",  # a state whose rows cannot be copied
    "openai-gpt",  # no cache
    "recurrent_gemma",  # a cache of its own
)
LENGTHS = (3, 17, 3, 9, 17, 1)  # of distinct prompts; longer than the windows of the tiny models
TEMPERATURE, NEW = 0.7, 7
STOPS = tuple(range(0, VOCAB_SIZE, 5))


@pytest.fixture(scope="module", params=KINDS)
def lm(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def prompts_of(samples: int) -> list[list[int]]:
    """Every distinct prompt several times, in an order that mixes them."""
    generator = torch.Generator().manual_seed(3)
    distinct = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]
    order = torch.randperm(len(distinct) * samples, generator=generator).tolist()
    return [distinct[number % len(distinct)] for number in order]


@torch.no_grad()
def slow_sample(lm: Any, prompt: list[int], seed: int, stops: Sequence[int]) -> tuple[list[int], list[float]]:
    """One response by the model's own forward pass over the whole text for every token."""
    uniforms = torch.rand(NEW, generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    logprobs: list[float] = []
    for uniform in uniforms:
        tokens = torch.tensor([prompt + ids])
        logits = lm(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0, -1]
        probabilities = torch.softmax(logits.double() / TEMPERATURE, dim=-1)
        total, token = 0.0, 0
        for token, probability in enumerate(probabilities.tolist()):  # noqa: B007
            total += probability
            if total > uniform:
                break
        ids.append(token)
        logprobs.append(float(probabilities[token].log()))
        if token in stops:
            break
    return ids, logprobs


def calls_of(lm: Any, prompts: Sequence[Sequence[int]], config: SamplingConfig, stops: tuple[int, ...]) -> Any:
    """The samples, and the shape of the ids of every call of the decoder."""
    shapes: list[tuple[int, ...]] = []
    handle = decoder_of(lm).register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    samples = sample(lm, prompts, config, range(len(prompts)), stop_ids=stops)
    handle.remove()
    return samples, shapes


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("stops", [(), STOPS], ids=["none stops", "rows stop"])
def test_samples_equal_one_text_at_a_time(lm: Any, batch_size: int, stops: tuple[int, ...]) -> None:
    prompts = prompts_of(2)
    config = SamplingConfig(max_new_tokens=NEW, temperature=TEMPERATURE, batch_size=batch_size)
    samples = sample(lm, prompts, config, range(len(prompts)), stop_ids=stops)
    expected = [slow_sample(lm, prompt, seed, stops) for seed, prompt in enumerate(prompts)]
    assert [ids for ids, _ in samples] == [ids for ids, _ in expected]
    for (_, logprobs), (_, slow) in zip(samples, expected, strict=True):
        assert logprobs == pytest.approx(slow, abs=1e-3)
    assert len({len(ids) for ids, _ in samples}) > 2 or not stops


def test_distinct_prompts_are_computed_once(lm: Any) -> None:
    prompts = prompts_of(3)
    _, shapes = calls_of(lm, prompts, SamplingConfig(max_new_tokens=2, batch_size=64), ())
    distinct = {tuple(prompt) for prompt in prompts}
    first_calls = [shape for shape in shapes if shape[1] > 1]
    if lm.config.model_type == "xlstm":  # of a kind of which nothing can be copied, so that they are computed again
        assert sum(rows for rows, _ in first_calls) > len(distinct)
    elif lm.config.model_type != "openai-gpt":
        computed = sum(rows for rows, _ in shapes) - len(prompts)  # without the second token of every row
        assert computed == len(distinct)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_batches_have_little_padding(kind: str) -> None:
    lm: Any = tiny_model(kind)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randperm(32, generator=generator).add(1).tolist()
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
    _, shapes = calls_of(lm, prompts, SamplingConfig(max_new_tokens=1, batch_size=8), ())
    assert attends_by_position(lm)
    assert sorted(shapes) == [(8, 8), (8, 16), (8, 24), (8, 32)]


def test_finished_rows_leave_the_cache() -> None:
    decoding = Decoding(tiny_model("llama"), [[7, 8], [9], [7, 8], [10, 11, 12]])
    with torch.inference_mode():
        decoding.advance()
        decoding.append(torch.tensor([3, 4, 5, 6]), torch.tensor([3, 1]))
        logits = decoding.advance()
    assert len(logits) == 2
    assert all(layer.keys.shape[0] == 2 for layer in decoding.cache["past_key_values"].layers)


@pytest.mark.parametrize(
    ("finished", "kept"),
    [
        ([0, 0, 0], [0, 1, 2]),
        ([1, 1, 1], []),
        ([0, 0, 1], [0, 1]),
        ([1, 0, 0, 0], [3, 1, 2]),
        ([1, 0, 1, 0, 0], [3, 1, 4]),
        ([1, 1, 0, 0], [2, 3]),
        ([1, 1, 1, 0], [3]),
    ],
)
def test_last_rows_take_the_places_of_finished_ones(finished: list[int], kept: list[int]) -> None:
    assert _unfinished(torch.tensor(finished, dtype=torch.bool)).tolist() == kept


def slow_draw(logits: Tensor, uniform: float) -> int:
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    return int((cumulative <= uniform * cumulative[-1]).sum())


@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 512, 1000])
def test_draws_equal_those_of_one_cumulative_sum(vocab_size: int) -> None:
    """The vocabulary is divided into blocks of 256 tokens; the last one may be shorter."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(400, vocab_size, generator=generator)
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    chosen, logprobs = _draw(logits, uniforms)
    assert chosen.tolist() == [slow_draw(row, u) for row, u in zip(logits, uniforms.tolist(), strict=True)]
    expected = torch.log_softmax(logits.double(), dim=-1).gather(1, chosen[:, None]).squeeze(1)
    assert torch.allclose(logprobs.double(), expected, atol=1e-6)


def test_impossible_tokens_beside_the_boundary_of_two_blocks_are_never_sampled() -> None:
    """Draws just below the boundary of two blocks, where the sums of blocks and tokens round differently."""
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(2000, 512, generator=generator)
    for tokens in (slice(0, 50), slice(100, None)):
        logits.view(2000, 2, 256)[:, :, tokens] = float("-inf")
    sums = torch.softmax(logits, dim=-1).view(2000, 2, 256).sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    boundaries = (sums[:, 0] / sums[:, 1]).nextafter(torch.zeros(2000, dtype=torch.float64))
    chosen, logprobs = _draw(logits, boundaries)
    assert set((chosen % 256).tolist()) <= set(range(50, 100))
    assert logprobs.isfinite().all()
