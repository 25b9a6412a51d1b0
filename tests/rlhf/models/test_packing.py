"""Rows that are packed into one sequence give the states and gradients of rows that run alone."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.rlhf.config.model import LoraConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.microbatches import PASS_TOKENS, fill_microbatches, plan_passes
from components.rlhf.models import packing
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.packing import PackedRows, pack_limit, plan_for, run_rows
from tests.support.tiny_models import CannotBuild, causal_lm_types, tiny_model

LENGTHS = [5, 2, 7, 7, 1, 4]
# Attention of several kinds: grouped queries, scaled, with normed queries, latent, learned positions, two softmaxes, experts.
KINDS = ("llama", "qwen3", "granite", "gpt2", "opt", "deepseek_v3", "diffllama", "mixtral", "qwen2_moe", "gemma3_text")
# Not causal: import refuses them.
BIDIRECTIONAL = {
    "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "roberta", "roberta-prelayernorm", "roc_bert",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def rows_of(vocab_size: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, S], and lengths [B]."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(1, vocab_size, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return ids, torch.tensor(lengths)


def alone(lm: Any, ids: Tensor, lengths: list[int], **options: Any) -> list[Tensor]:
    """States [S, H] of each row, in a batch of its own."""
    found = [
        run_rows(lm, ids[row : row + 1, :length], torch.tensor([length]), pack_limit=0, **options)
        for row, length in enumerate(lengths)
    ]
    return [states[0] if isinstance(states, Tensor) else states.last_hidden_state[0] for states in found]


def is_packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each pack from now on."""
    made: list[int] = []

    class Recorded(PackedRows):
        def __init__(self, lengths: list[int], *args: Any) -> None:
            made.append(len(lengths))
            super().__init__(lengths, *args)

    monkeypatch.setattr(packing, "PackedRows", Recorded)
    return made


@pytest.mark.parametrize("kind", causal_lm_types())
def test_every_architecture_that_packs_gives_the_states_of_single_rows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        lm: Any = tiny_model(kind)
    except CannotBuild:
        pytest.skip("transformers cannot build it")
    if kind in BIDIRECTIONAL or not hasattr(lm.config.get_text_config(), "num_hidden_layers"):
        return
    limit = pack_limit(lm)
    if limit == 0:
        return
    sizes = [min(length, limit) for length in LENGTHS]
    made = is_packed(monkeypatch)
    ids, lengths = rows_of(lm.config.get_text_config().vocab_size, sizes)
    with torch.no_grad():
        packed = run_rows(lm, ids, lengths, pack_limit=limit).last_hidden_state
        expected = alone(lm, ids, sizes)
    assert made == [6]
    for row, states in enumerate(expected):
        torch.testing.assert_close(packed[row, : len(states)], states, rtol=1e-3, atol=1e-4)
        assert not packed[row, len(states) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_have_the_gradients_of_single_rows(kind: str) -> None:
    lm: Any = tiny_model(kind)
    ids, lengths = rows_of(lm.config.get_text_config().vocab_size, LENGTHS)
    limit = pack_limit(lm)
    assert limit >= 7
    gradients = []
    for packs in (True, False):
        lm.zero_grad()
        states = (
            [run_rows(lm, ids, lengths, pack_limit=limit).last_hidden_state[row, :n] for row, n in enumerate(LENGTHS)]
            if packs
            else alone(lm, ids, LENGTHS)
        )
        generator = torch.Generator().manual_seed(3)
        torch.stack([(x * torch.randn(x.shape, generator=generator)).sum() for x in states]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_range_of_layers_packs_its_states(kind: str) -> None:
    lm: Any = tiny_model(kind)
    ids, lengths = rows_of(lm.config.get_text_config().vocab_size, LENGTHS)
    with torch.no_grad():
        below = run_rows(lm, ids, lengths, pack_limit=99, stop=2)
        above = run_rows(lm, ids, lengths, pack_limit=99, start=2, states=below).last_hidden_state
        for row, (lower, whole) in enumerate(
            zip(alone(lm, ids, LENGTHS, stop=2), alone(lm, ids, LENGTHS), strict=True)
        ):
            torch.testing.assert_close(below[row, : len(lower)], lower, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(above[row, : len(whole)], whole, rtol=1e-4, atol=1e-5)


def actor_of(folder: Path, *, frozen: int = 0, lora: bool = False, checkpointing: bool = False) -> Actor:
    lm = load_causal_lm(folder, num_frozen_layers=frozen, dtype=torch.float32, trainable=not lora)
    if lora:
        add_adapters(lm, LoraConfig(), num_frozen_layers=frozen, seed=1)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    if checkpointing:
        enable_gradient_checkpointing(lm)
    return Actor(lm, num_frozen_layers=frozen, dtype=torch.float32)


@pytest.mark.parametrize("changes", [{}, {"frozen": 2}, {"lora": True}, {"checkpointing": True}], ids=str)
def test_log_probs_and_gradients_of_the_actor_do_not_depend_on_packing(
    tiny_model: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = actor_of(tiny_model, **changes)
    batch = collate([[5, 6, 7], [8], [9, 10]], [[3, 4, 1], [1, 2, 9, 10, 11, 12], [7]])
    made, results = is_packed(monkeypatch), []
    for limit in (sys.maxsize, 0):
        actor.pack_limit = limit
        actor.zero_grad()
        logprobs, _ = actor(batch, SamplingDistribution(temperature=0.7), actor.trunk(batch))
        logprobs.square().sum().backward()
        results.append((logprobs, {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}))
    assert made
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_rows_beyond_a_window_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm: Any = tiny_model("mistral")
    lm.config.sliding_window = 6
    assert pack_limit(lm) == 6
    made = is_packed(monkeypatch)
    ids, lengths = rows_of(lm.config.vocab_size, LENGTHS)
    with torch.no_grad():
        states = run_rows(lm, ids, lengths, pack_limit=6).last_hidden_state
        assert not made
        for row, expected in enumerate(alone(lm, ids, LENGTHS)):
            torch.testing.assert_close(states[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        "mamba",
        "rwkv",
        "bloom",
        "falcon",
        "falcon_h1",
        "lfm2_moe",
        "qwen3_next",
        "llama4_text",
        "doge",
        "gemma2",
        "nemotron",
    ],
)
def test_models_with_other_states_or_attention_do_not_pack(kind: str) -> None:
    assert pack_limit(tiny_model(kind)) == 0


def test_layer_with_a_bias_is_refused() -> None:
    rows, x = PackedRows([2, 1], 2, torch.device("cpu")), torch.zeros(1, 1, 3, 4)
    for mask, bias in ((torch.zeros(1, 1, 3, 3), None), (None, torch.zeros(1, 1, 3, 3))):
        with pytest.raises(ValueError, match="Linear adds a bias, so its rows cannot be packed"):
            packing.packed_attention(torch.nn.Linear(1, 1), x, x, x, mask, packed_rows=rows, position_bias=bias)


def test_rows_of_one_length_run_as_they_are(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, made = actor_of(tiny_model), is_packed(monkeypatch)
    actor(collate([[5, 6], [7]], [[8], [9, 10]]), SamplingDistribution())
    assert actor.pack_limit == sys.maxsize and not made


@settings(max_examples=100)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_packing_and_unpacking_keep_every_token(lengths: list[int]) -> None:
    rows = PackedRows(lengths, max(lengths), torch.device("cpu"))
    x = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) + 1
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packed = rows.pack(x)
    assert packed.shape == (1, sum(lengths))
    assert torch.equal(rows.unpack(packed), torch.where(mask, x, 0))
    positions = torch.arange(max(lengths)).expand_as(x)
    assert torch.equal(rows.position_ids, rows.pack(positions))
    # Attention takes the rows of each group apart, and puts their tokens back in order.
    states = packed[:, None, :, None].float()
    tokens = [group.tokens(group.rows(states).transpose(1, 2)) for group in rows.groups]
    assert torch.equal(torch.cat(tokens)[:, 0, 0], packed[0].float())
    for group in rows.groups:
        assert max(group.lengths) - min(group.lengths) < PASS_TOKENS


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=20), st.integers(1, 200), st.sampled_from([0, 20, 40, sys.maxsize]))
def test_long_rows_are_planned_with_padding_and_short_ones_packed(lengths: list[int], budget: int, limit: int) -> None:
    models = [SimpleNamespace(pack_limit=limit), SimpleNamespace(pack_limit=sys.maxsize)]
    passes = plan_for(*models)(lengths, budget)
    assert sorted(row for rows in passes for row in rows) == list(range(len(lengths)))
    short = [length for length in lengths if length <= limit]
    long = [length for length in lengths if length > limit]
    found = sorted(sorted(lengths[row] for row in rows) for rows in passes)
    expected = [[short[i] for i in rows] for rows in fill_microbatches(short, budget)]
    expected += [[long[i] for i in rows] for rows in plan_passes(long, budget)]
    assert found == sorted(map(sorted, expected))
