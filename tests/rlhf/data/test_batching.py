from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.data.batching import (
    collate,
    epoch_order,
    step_batches,
)

IDS = st.lists(st.integers(0, 9), max_size=5)
ROWS = st.lists(st.tuples(IDS.filter(bool), IDS), min_size=1, max_size=5)


# --- collate ---


def test_example_of_docstring() -> None:
    batch = collate([[5, 6], [7]], [[8, 2], [9, 9, 2]])
    assert len(batch) == 2
    assert batch.input_ids.tolist() == [[5, 6, 8, 2], [7, 9, 9, 2]]
    assert batch.response_ids.tolist() == [[8, 2, 0], [9, 9, 2]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.prompt_lengths.tolist() == [2, 1]
    assert batch.response_lengths.tolist() == [2, 3]
    # The state before the first action is the last prompt token; positions beyond the row are clamped.
    assert batch.state_positions().tolist() == [[1, 2, 3], [0, 1, 2]]
    assert batch.last_positions().tolist() == [3, 3]
    assert batch.input_ids.dtype == batch.response_ids.dtype == torch.int64
    assert batch.response_mask.dtype == torch.bool


def test_turns_between_answers_are_not_masked_in_but_are_tokens_of_the_row() -> None:
    batch = collate([[1], [1]], [[2, 3, 4, 5], [6]], [[True, False, False, True], [True]])
    assert batch.response_mask.tolist() == [[True, False, False, True], [True, False, False, False]]
    assert batch.lengths.tolist() == [5, 2]
    assert batch.response_lengths.tolist() == [4, 1]
    assert batch.last_positions().tolist() == [4, 1]
    assert batch.attention_mask().tolist() == [[True] * 5, [True, True, False, False, False]]
    assert batch.select(torch.tensor([1])).lengths.tolist() == [2]


def test_positions_beyond_the_row_width_are_clamped() -> None:
    batch = collate([[1, 1, 1], [1]], [[2], [2, 2, 2]])
    assert batch.input_ids.shape == (2, 4)
    assert batch.state_positions().tolist() == [[2, 3, 3], [0, 1, 2]]
    assert batch.last_positions().tolist() == [3, 3]


def test_empty_response_has_no_action() -> None:
    batch = collate([[4, 5]], [[]])
    assert batch.response_mask.tolist() == [[False]]
    assert batch.response_lengths.tolist() == [0]
    assert batch.last_positions().tolist() == [1]


def test_empty_prompt_is_rejected() -> None:
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        collate([[1], []], [[2], [2]])


def test_different_numbers_of_prompts_and_responses_are_rejected() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        collate([[1], [1]], [[2]])


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_all_tokens_can_be_recovered(rows: list[tuple[list[int], list[int]]]) -> None:
    """Masks depend only on lengths: id 0 is a normal id."""
    prompts, responses = [row[0] for row in rows], [row[1] for row in rows]
    batch = collate(prompts, responses)
    for row, (prompt, response) in enumerate(rows):
        assert batch.input_ids[row, : len(prompt) + len(response)].tolist() == prompt + response
        assert batch.input_ids[row, len(prompt) + len(response) :].eq(0).all()
        assert batch.response_ids[row][batch.response_mask[row]].tolist() == response
        last = (prompt + response)[-1]
        assert batch.input_ids[row, batch.last_positions()[row]] == last
        states = batch.input_ids[row, batch.state_positions()[row]][batch.response_mask[row]].tolist()
        assert states == ([prompt[-1], *response])[: len(response)]


def test_select_drops_the_padding_that_the_rows_do_not_need() -> None:
    batch = collate([[5, 6], [7], [8]], [[8, 2], [9, 9, 2, 3], [1]])
    selected = batch.select(torch.tensor([2, 0])).to(torch.device("cpu"))
    assert selected.input_ids.tolist() == [[8, 1, 0, 0], [5, 6, 8, 2]]
    assert selected.response_ids.tolist() == [[1, 0], [8, 2]]
    assert selected.response_mask.tolist() == [[True, False], [True, True]]
    assert selected.response_lengths.tolist() == [1, 2]
    assert selected.prompt_lengths.tolist() == [1, 2]


# --- order ---


def test_epoch_order_depends_on_seed_and_epoch() -> None:
    first = epoch_order(50, seed=1, epoch=0)
    assert sorted(first) == list(range(50))
    assert first == epoch_order(50, seed=1, epoch=0)
    assert first != list(range(50))
    assert first != epoch_order(50, seed=1, epoch=1)
    assert first != epoch_order(50, seed=2, epoch=0)
    # Seed 1 with epoch 11 differs from seed 11 with epoch 1.
    assert epoch_order(50, seed=1, epoch=11) != epoch_order(50, seed=11, epoch=1)


def test_epoch_order_is_fixed_across_machines() -> None:
    """A resumed run may continue on another machine with another Python version."""
    assert epoch_order(8, seed=0, epoch=0) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_epoch_covers_all_rows_and_last_batch_may_be_short() -> None:
    batches = list(step_batches(7, 3, seed=0, num_epochs=2, max_steps=0))
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1]
    assert sum(batches[:3], []) == epoch_order(7, seed=0, epoch=0)
    assert sum(batches[3:], []) == epoch_order(7, seed=0, epoch=1)


def test_max_steps_yields_a_prefix() -> None:
    """A shorter run sees the same batches as a longer one."""
    all_batches = list(step_batches(7, 3, seed=0, num_epochs=2, max_steps=0))
    for steps in range(1, 7):
        assert list(step_batches(7, 3, seed=0, num_epochs=2, max_steps=steps)) == all_batches[:steps]
    assert list(islice(step_batches(7, 3, seed=0, num_epochs=2, max_steps=99), 99)) == all_batches
