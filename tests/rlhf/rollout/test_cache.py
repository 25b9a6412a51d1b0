import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from components.rlhf.rollout import cache as cache_module
from components.rlhf.rollout.cache import ROOM, GrowingLayer, copy_rows, has_rows, keep_rows

HEADS, KEY_DIM, VALUE_DIM = 2, 4, 3


def states(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(rows, HEADS, length, KEY_DIM, generator=generator),
        torch.randn(rows, HEADS, length, VALUE_DIM, generator=generator),
    )


def cache_of(rows: int, length: int) -> DynamicCache:
    """A cache of two layers of full and one of sliding attention."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4), DynamicLayer()]
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        cache.update(*states(rows, length, generator), index)
    return cache


@pytest.mark.parametrize("room", [1, 3, 64])
@pytest.mark.parametrize("seed", range(5))
def test_growing_layer_equals_the_layer_that_copies(monkeypatch: pytest.MonkeyPatch, room: int, seed: int) -> None:
    """Random sequences of tokens and leaving rows."""
    monkeypatch.setattr(cache_module, "ROOM", room)
    generator = torch.Generator().manual_seed(seed)
    plain = DynamicLayer()
    plain.update(*states(3, 5, generator))
    rows = torch.tensor([2, 0, 0, 1, 2, 0])
    growing = GrowingLayer(plain, rows)
    plain.batch_select_indices(rows)
    for step in range(20):
        new = states(len(plain.keys), 1 + step % 3, generator)
        for own, expected in zip(growing.update(*new), plain.update(*new), strict=True):
            assert torch.equal(own, expected)
        if step % 4 == 3 and len(plain.keys) > 1:
            kept = torch.randperm(len(plain.keys), generator=generator)[:-1]
            growing.batch_select_indices(kept)
            plain.batch_select_indices(kept)
            assert torch.equal(growing.keys, plain.keys) and torch.equal(growing.values, plain.values)
        assert growing.get_seq_length() == plain.get_seq_length()
        assert growing.get_mask_sizes(1) == plain.get_mask_sizes(1)


def test_tokens_are_written_in_place_until_the_room_is_used() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = DynamicLayer()
    plain.update(*states(2, 5, generator))
    growing = GrowingLayer(plain, torch.arange(2))
    places = set()
    for _ in range(2 * ROOM):
        growing.update(*states(2, 1, generator))
        places.add(growing.keys.data_ptr())
    assert len(places) == 2


def test_copied_rows_are_those_of_each_prompt() -> None:
    cache = cache_of(2, 6)
    before, rows = copy.deepcopy(cache), torch.tensor([1, 0, 1])
    copy_rows(cache, rows)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, DynamicSlidingWindowLayer, GrowingLayer]
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys[rows]) and torch.equal(layer.values, old.values[rows])
    keep_rows(cache, torch.tensor([2]))
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys[[1]]) and torch.equal(layer.values, old.values[[1]])


def test_rows_of_an_unknown_cache_are_not_touched() -> None:
    assert has_rows(DynamicCache())
    assert not has_rows([torch.zeros(2)])
