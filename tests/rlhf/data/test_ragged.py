"""Values of rows of different lengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.data.ragged import Ragged


def test_padding_is_dropped_and_restored_as_zeros() -> None:
    ragged = Ragged(torch.tensor([3, 1, 2]))
    ragged.put(torch.tensor([1, 2]), torch.tensor([[4.0, 99.0], [5.0, 6.0]]))
    ragged.put(torch.tensor([0]), torch.tensor([[1.0, 2.0, 3.0]]))
    assert ragged.values is not None and ragged.values.tolist() == [1, 2, 3, 4, 5, 6]
    assert ragged.select(torch.tensor([2, 1])).tolist() == [[5, 6], [4, 0]]
    assert ragged.select(torch.tensor([0, 1])).tolist() == [[1, 2, 3], [4, 0, 0]]


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8), st.randoms(use_true_random=False), st.sampled_from([(), (3,)])
)
def test_any_rows_come_back_as_they_were_put_in(lengths: list[int], draw, shape: tuple[int, ...]) -> None:
    ragged = Ragged(torch.tensor(lengths))
    rows = [torch.randn(length, *shape) for length in lengths]
    order = list(range(len(lengths)))
    draw.shuffle(order)
    for row in order:
        padded = torch.cat([rows[row], torch.full((draw.randint(0, 3), *shape), 9.0)])
        ragged.put(torch.tensor([row]), padded[None])
    chosen = [draw.choice(order) for _ in range(4)]
    found = ragged.select(torch.tensor(chosen))
    assert found.shape[1] == max(lengths[row] for row in chosen)
    for row, values in zip(chosen, found, strict=True):
        assert torch.equal(values[: lengths[row]], rows[row])
        assert not values[lengths[row] :].any()


def test_reading_before_writing_is_an_error() -> None:
    with pytest.raises(AssertionError):
        Ragged(torch.tensor([1])).select(torch.tensor([0]))
