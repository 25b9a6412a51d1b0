import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.maths.masks import length_mask, next_token_mask, state_positions
from tests.support.random_batches import equal, randn

# One (prompt length, response length) per row.
ROWS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


def test_length_mask() -> None:
    assert length_mask(torch.tensor([2, 0, 3]), 3).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert length_mask(torch.tensor([2]), 3).dtype == torch.bool


def test_state_before_an_action_is_one_position_to_the_left() -> None:
    # A prompt of 3 has positions 0, 1, 2: the state before the first action is at 2.
    assert state_positions(torch.tensor([3, 1]), 3).tolist() == [[2, 3, 4], [0, 1, 2]]


def test_next_token_mask() -> None:
    # p p r r . : the tokens at 2 and 3 are responses, so columns 1 and 2 predict responses
    # p p p p r : column 3
    # p p . . . : no response
    got = next_token_mask(torch.tensor([2, 4, 2]), torch.tensor([4, 5, 2]), 5)
    assert got.tolist() == [[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_next_token_mask_selects_the_state_positions(rows: list[tuple[int, int]]) -> None:
    """The columns that predict a response token are the states before the real actions."""
    prompts, responses = torch.tensor(rows).T
    num_actions, width = int(responses.max()), 10
    at_states = next_token_mask(prompts, prompts + responses, width).gather(1, state_positions(prompts, num_actions))
    assert torch.equal(at_states, length_mask(responses, num_actions))
    assert torch.equal(next_token_mask(prompts, prompts + responses, width).sum(dim=1), responses)


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_state_positions_equal_openrlhf_slices(rows: list[tuple[int, int]]) -> None:
    """Right-padded rows read at state_positions == left-padded rows cut by `[:, :-1]` and then `[:, -num_actions:]`."""
    prompts, responses = torch.tensor(rows).T
    num_actions, widest_prompt = int(responses.max()), int(prompts.max())
    width = widest_prompt + num_actions
    right_padded, left_padded = randn(len(rows), width, seed=1), randn(len(rows), width, seed=2)
    for row, (prompt, response) in enumerate(rows):
        values = randn(prompt + response, seed=3 + row)  # one value per non-padding token
        right_padded[row, : prompt + response] = values
        left_padded[row, widest_prompt - prompt : widest_prompt + response] = values

    selected = right_padded.gather(1, state_positions(prompts, num_actions))
    openrlhf = left_padded[:, :-1][:, -num_actions:]
    real = length_mask(responses, num_actions)
    assert equal(selected[real], openrlhf[real])
