import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from components.rlhf.maths.masked import Reduce, masked_mean, masked_moments, whiten
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

MASK = ragged(4, 1, 0, 3)


def test_mean_ignores_padding() -> None:
    # (1 + 2 + 6) / 3
    assert equal(masked_mean(doubles([1, 2, 100], [6, 100, 100]), ragged(2, 1, width=3)), 3.0)


def test_mean_of_empty_mask_is_zero() -> None:
    assert masked_mean(randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_variance_is_biased() -> None:
    # mean (2 + 6 + 4) / 3 = 4, variance (4 + 4 + 0) / 3
    mean, variance = masked_moments(doubles([2, 6], [4, 9]), ragged(2, 1))
    assert equal(mean, 4.0) and equal(variance, 8 / 3)


def test_moments_of_empty_mask_are_zero() -> None:
    mean, variance = masked_moments(randn(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert mean == 0 and variance == 0


def test_variance_is_precise_for_a_large_mean_in_fp32() -> None:
    x = (randn(16, 64) * 0.1 + 5000).float()
    _, variance = masked_moments(x, torch.ones_like(x, dtype=torch.bool))
    assert variance.dtype == torch.float32
    # E[x^2] - E[x]^2 would be a difference of numbers near 2.5e7, where the spacing of fp32 is 2.
    assert variance.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-3)


def test_hand_computed_whitening() -> None:
    # mean 4, variance ((2 - 4)^2 + (6 - 4)^2) / 2 = 4, standard deviation 2
    x, mask = doubles([2, 6, 50]), ragged(2, width=3)
    assert equal(whiten(x, mask), [[-1, 1, 0]])
    assert equal(whiten(x, mask, shift_mean=False), [[3, 5, 0]])


def test_whitened_tokens_have_mean_0_and_variance_1() -> None:
    mean, variance = masked_moments(whiten(3 * randn(4, 4) + 7, MASK), MASK)
    assert equal(mean, 0.0) and equal(variance, 1.0)


def test_variance_floor_of_whitening() -> None:
    # mean 1e-6, variance 1e-12 is below 1e-8: divided by sqrt(1e-8) = 1e-4, not by 1e-6
    assert equal(whiten(doubles([0, 2e-6]), ragged(2)), [[-0.01, 0.01]])
    assert equal(whiten(doubles([7, 7, 7]), ragged(3)), [[0, 0, 0]])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_nothing(garbage: float) -> None:
    x = randn(4, 4)
    corrupted = spoil(x, MASK, garbage)
    assert equal(masked_mean(corrupted, MASK), masked_mean(x, MASK))
    for got, expected in zip(masked_moments(corrupted, MASK), masked_moments(x, MASK), strict=True):
        assert equal(got, expected)
    for shift_mean in (True, False):
        assert equal(whiten(corrupted, MASK, shift_mean=shift_mean), whiten(x, MASK, shift_mean=shift_mean))
    assert bool((whiten(corrupted, MASK)[~MASK] == 0).all())


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_has_no_gradient(garbage: float) -> None:
    x = spoil(randn(4, 4), MASK, garbage).requires_grad_()
    masked_mean(x, MASK).backward()
    assert equal(x.grad, MASK / MASK.sum())


def test_permuting_the_batch_permutes_the_result() -> None:
    x, order = randn(4, 4), torch.tensor([2, 0, 3, 1])
    assert equal(whiten(x[order], MASK[order]), whiten(x, MASK)[order])


def run_on_ranks(shards: list[Callable[[Reduce], Tensor]]) -> list[Tensor]:
    """Run each shard in a thread, with a `reduce` that sums over all of them like a process group."""
    barrier, slots = threading.Barrier(len(shards), timeout=10), [torch.zeros(())] * len(shards)

    def reduce_of(rank: int) -> Reduce:
        def reduce(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait()
            total = sum(slots[1:], slots[0])
            barrier.wait()
            return total

        return reduce

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(lambda rank: shards[rank](reduce_of(rank)), range(len(shards))))


@pytest.mark.parametrize("split", [1, 2, 3], ids=["1+3 rows", "2+2 rows", "3+1 rows"])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_on_two_ranks_equals_one_process(split: int, shift_mean: bool) -> None:
    x = 3 * randn(4, 4) + 7
    parts = [(x[:split], MASK[:split]), (x[split:], MASK[split:])]
    got = run_on_ranks([lambda r, p=part: whiten(*p, shift_mean=shift_mean, reduce=r) for part in parts])
    assert equal(torch.cat(got), whiten(x, MASK, shift_mean=shift_mean))


def test_rank_without_tokens_participates() -> None:
    x, empty = randn(4, 4), torch.zeros(2, 4, dtype=torch.bool)
    parts = [(x, MASK), (randn(2, 4, seed=1), empty)]
    moments = run_on_ranks([lambda r, p=part: torch.stack(masked_moments(*p, reduce=r)) for part in parts])
    for got in moments:
        assert equal(got, torch.stack(masked_moments(x, MASK)))
