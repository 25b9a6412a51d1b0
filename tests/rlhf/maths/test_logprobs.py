import math

import pytest
import torch

from components.rlhf.maths.logprobs import entropy, token_logprobs
from tests.support.random_batches import doubles, equal, randn

LOGITS, LABELS = 3 * randn(2, 5, 7), torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(0))


def test_hand_computed_logprobs() -> None:
    # probabilities 1/4 and 3/4; at temperature 2, exp(ln(3) / 2) = sqrt(3) against 1
    logits = torch.log(doubles([1, 3], [1, 3]))
    assert equal(token_logprobs(logits, torch.tensor([0, 1])), [math.log(1 / 4), math.log(3 / 4)])
    root = math.sqrt(3)
    expected = [math.log(1 / (1 + root)), math.log(root / (1 + root))]
    assert equal(token_logprobs(logits, torch.tensor([0, 1]), temperature=2.0), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_probabilities_sum_to_1(temperature: float) -> None:
    all_logprobs = torch.stack([token_logprobs(LOGITS, torch.full_like(LABELS, v), temperature) for v in range(7)])
    assert equal(all_logprobs.exp().sum(dim=0), torch.ones(2, 5))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_adding_a_constant_to_the_logits_changes_nothing(temperature: float) -> None:
    shifted = LOGITS + 100 * randn(2, 5, 1, seed=1)
    got = token_logprobs(shifted, LABELS, temperature)
    assert equal(got, token_logprobs(LOGITS, LABELS, temperature))
    assert equal(entropy(shifted, temperature), entropy(LOGITS, temperature))


def test_temperature_divides_the_logits() -> None:
    assert equal(token_logprobs(LOGITS, LABELS, 0.7), token_logprobs(LOGITS / 0.7, LABELS))
    assert equal(entropy(LOGITS, 0.7), entropy(LOGITS / 0.7))


def test_gradient_is_one_hot_less_softmax() -> None:
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, LABELS, temperature=0.7).sum().backward()
    one_hot = torch.nn.functional.one_hot(LABELS, 7)
    assert equal(logits.grad, (one_hot - torch.softmax(LOGITS / 0.7, dim=-1)) / 0.7)


def test_permuting_the_batch_permutes_the_result() -> None:
    order = torch.tensor([1, 0])
    assert equal(token_logprobs(LOGITS[order], LABELS[order]), token_logprobs(LOGITS, LABELS)[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_low_precision_logits_are_computed_in_fp32(dtype: torch.dtype, temperature: float) -> None:
    logits = LOGITS.to(dtype)
    got = token_logprobs(logits, LABELS, temperature)
    assert got.dtype == torch.float32 and entropy(logits, temperature).dtype == torch.float32
    # The only rounding is that of the logits themselves.
    assert torch.allclose(got.double(), token_logprobs(logits.double(), LABELS, temperature), atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    assert equal(token_logprobs(doubles([1e4, 1e4 - 1]), torch.tensor([0])), [-math.log1p(math.exp(-1))])


def test_hand_computed_entropy() -> None:
    # uniform over 4: ln 4; 1/4 and 3/4: (1/4) ln 4 + (3/4) ln (4/3)
    assert equal(entropy(doubles([0, 0, 0, 0])), [math.log(4)])
    assert equal(entropy(torch.log(doubles([1, 3]))), [math.log(4) / 4 + 3 * math.log(4 / 3) / 4])


def test_entropy_is_minus_the_mean_log_probability() -> None:
    all_logprobs = torch.stack([token_logprobs(LOGITS, torch.full_like(LABELS, v), 1.5) for v in range(7)])
    assert equal(entropy(LOGITS, 1.5), -(all_logprobs.exp() * all_logprobs).sum(dim=0))


def test_masked_token_contributes_nothing() -> None:
    allowed = randn(3, 4)
    logits = torch.cat([allowed, torch.full((3, 2), -math.inf, dtype=torch.float64)], dim=1).requires_grad_()
    assert equal(entropy(logits), entropy(allowed))
    labels = torch.tensor([0, 1, 3])
    assert equal(token_logprobs(logits, labels), token_logprobs(allowed, labels))
    assert token_logprobs(logits[:1], torch.tensor([5])).item() == -math.inf


def test_masked_token_has_no_gradient() -> None:
    allowed = randn(3, 4).requires_grad_()
    (entropy(allowed).sum() + token_logprobs(allowed, torch.tensor([0, 1, 3])).sum()).backward()
    forbidden = torch.full((3, 2), -math.inf, dtype=torch.float64)
    logits = torch.cat([allowed.detach(), forbidden], dim=1).requires_grad_()
    (entropy(logits).sum() + token_logprobs(logits, torch.tensor([0, 1, 3])).sum()).backward()
    assert equal(logits.grad, torch.cat([allowed.grad, torch.zeros(3, 2)], dim=1))


def test_no_tokens_have_an_empty_gradient() -> None:
    """A rank may have fewer tokens than others, which all apply the head equally often."""
    logits = torch.zeros(0, 7, requires_grad=True)
    token_logprobs(logits, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 7)
    assert entropy(logits.detach()).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 6, 11])
def test_rows_beyond_the_cache_have_the_gradient_of_torchs_own_operations(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.rlhf.maths.logprobs.CACHED", 5 * 40)
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 40, generator=generator).to(dtype)
    labels, scale = torch.randint(40, (rows,), generator=generator), torch.randn(rows, generator=generator)
    gradients = []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        if ours:
            logprobs = token_logprobs(leaf, labels, 0.7)
        else:
            exact = leaf if dtype == torch.float64 else leaf.float()
            logprobs = torch.log_softmax(exact / 0.7, dim=-1).gather(1, labels[:, None])[:, 0]
        (logprobs * scale).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_second_backward_pass_is_an_error_and_not_a_wrong_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([0, 1, 2])).sum()
    logprobs.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 6, 11])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_has_the_gradient_of_torchs_own_operations(
    dtype: torch.dtype, rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.rlhf.maths.logprobs.CACHED", 5 * 40)
    logits = randn(rows, 40, seed=rows).to(dtype)
    logits[0, 3:] = -math.inf  # masked tokens
    weight, expected = randn(rows, seed=1), logits.double().clone().requires_grad_()
    allowed = torch.where(logits.isneginf(), 0, torch.log_softmax(expected / temperature, dim=-1))
    by_hand = -(torch.softmax(expected / temperature, dim=-1) * allowed).sum(-1)
    (by_hand * weight).sum().backward()
    got = logits.detach().clone().requires_grad_()
    result = entropy(got, temperature)
    (result * weight).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert got.grad is not None and expected.grad is not None and got.grad.dtype == dtype
    assert torch.allclose(result.detach().double(), by_hand.detach(), atol=tolerance)
    assert torch.allclose(got.grad.double(), expected.grad, atol=tolerance)


def test_second_backward_pass_of_the_entropy_is_an_error_and_not_a_wrong_gradient() -> None:
    logits = randn(3, 4).requires_grad_()
    found = entropy(logits).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_entropy_of_no_tokens_has_an_empty_gradient() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    entropy(logits).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 7)
