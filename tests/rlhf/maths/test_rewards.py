import pytest
import torch

from components.rlhf.maths.rewards import token_rewards
from tests.support.random_batches import GARBAGE, doubles, equal, ragged, randn, spoil

MASK = ragged(4, 1, 0, 3)
SCORES, KL = 3 * randn(4, seed=1), randn(4, 4)


def test_hand_computed_rewards() -> None:
    # -0.1 * kl at every token; the score 12 is clipped to 10 and added at the last: 10 - 0.04
    got = token_rewards(
        torch.tensor([12.0]), doubles([0.2, -0.1, -0.5, 0.4]), ragged(4), kl_coef=0.1, reward_clip=(-10, 10)
    )
    assert equal(got, [[-0.02, 0.01, 0.05, 9.96]])


def test_score_is_added_at_the_last_response_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()  # right-padded, gaps, empty
    got = token_rewards(doubles([5, 6, 7, 8])[0], torch.zeros(4, 4, dtype=torch.float64), mask, kl_coef=0.1)
    assert equal(got, [[0, 5, 0, 0], [0, 0, 0, 6], [0, 0, 7, 0], [0, 0, 0, 0]])


def test_score_is_clipped_before_adding_the_kl_penalty() -> None:
    # -12 is clipped to -10, and the KL of 50 lowers it to -10 - 5 = -15, outside the clip
    got = token_rewards(torch.tensor([-12.0]), doubles([50]), ragged(1), kl_coef=0.1, reward_clip=(-10, 10))
    assert equal(got, [[-15]])
    assert equal(token_rewards(torch.tensor([-12.0]), doubles([50]), ragged(1), kl_coef=0.1), [[-17]])


def test_clip_can_be_asymmetric() -> None:
    scores, nothing = torch.tensor([-3.0, 3.0]), torch.zeros(2, 1)
    got = token_rewards(scores, nothing, ragged(1, 1), kl_coef=0.0, reward_clip=(-1, 2))
    assert equal(got, [[-1], [2]])


def test_negative_coefficient_counts_as_0() -> None:
    got, expected = (token_rewards(SCORES, KL, MASK, kl_coef=coef) for coef in (-0.3, 0.0))
    assert equal(got, expected)


def test_row_sum_is_score_minus_kl_penalty() -> None:
    penalty = 0.1 * torch.where(MASK, KL, 0).sum(dim=1)
    expected = torch.where(MASK.any(dim=1), SCORES - penalty, 0)
    assert equal(token_rewards(SCORES, KL, MASK, kl_coef=0.1).sum(dim=1), expected)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_changes_nothing(garbage: float) -> None:
    got = token_rewards(
        spoil(SCORES, MASK.any(dim=1), garbage), spoil(KL, MASK, garbage), MASK, kl_coef=0.1, reward_clip=(-2, 2)
    )
    assert equal(got, token_rewards(SCORES, KL, MASK, kl_coef=0.1, reward_clip=(-2, 2)))
    assert bool((got[~MASK] == 0).all())


def test_permuting_the_batch_permutes_the_result() -> None:
    order = torch.tensor([2, 0, 3, 1])
    got = token_rewards(SCORES[order], KL[order], MASK[order], kl_coef=0.1)
    assert equal(got, token_rewards(SCORES, KL, MASK, kl_coef=0.1)[order])


def test_result_has_the_dtype_of_the_kl() -> None:
    assert token_rewards(SCORES.double(), KL.float(), MASK, kl_coef=0.1).dtype == torch.float32
