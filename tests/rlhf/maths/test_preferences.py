"""Properties of the losses on preferences; tests/golden compares them with TRL's numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.rlhf.maths.preferences import dpo_loss, ipo_loss, kl_of_mismatches, kto_loss, robust_loss, simpo_loss

ratios = st.floats(-50, 50).map(lambda x: torch.tensor([x], dtype=torch.float64))
betas, noises = st.floats(0.01, 2), st.floats(0, 0.45)


def value(loss: Tensor) -> float:
    return loss.item()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (dpo_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.5), math.log1p(math.exp(-1.5))),
        (ipo_loss(torch.tensor([0.75]), torch.tensor([0.25]), beta=0.25), 2.25),  # (0.5 - 2) ** 2
        (simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=0.5), math.log1p(math.exp(-1.5))),
        (kto_loss(torch.tensor([4.0]), torch.tensor([True]), torch.tensor(1.0), beta=0.5), 1 / (1 + math.exp(1.5))),
        (kto_loss(torch.tensor([4.0]), torch.tensor([False]), torch.tensor(1.0), beta=0.5), 1 / (1 + math.exp(-1.5))),
        (kl_of_mismatches(torch.tensor(6.0), 4), 1.5),
        (kl_of_mismatches(torch.tensor(-6.0), 4), 0.0),
    ],
)
def test_values_by_hand(loss: Tensor, expected: float) -> None:
    assert value(loss) == pytest.approx(expected, rel=1e-6)


@given(chosen=ratios, rejected=ratios, beta=betas, noise=noises)
def test_robust_loss_is_unbiased_under_flipped_labels(
    chosen: Tensor, rejected: Tensor, beta: float, noise: float
) -> None:
    """Its expectation, if a pair is the wrong way round with this probability, is DPO's loss of the right one."""
    right, wrong = (
        robust_loss(*pair, beta=beta, label_smoothing=noise) for pair in ((chosen, rejected), (rejected, chosen))
    )
    expected = (1 - noise) * right + noise * wrong
    assert value(expected) == pytest.approx(value(dpo_loss(chosen, rejected, beta=beta)), rel=1e-6, abs=1e-9)


@given(beta=betas, noise=st.floats(0.05, 0.45))
def test_conservative_loss_is_least_at_its_target(beta: float, noise: float) -> None:
    margin = torch.tensor([math.log((1 - noise) / noise) / beta], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(margin, torch.zeros(1, dtype=torch.float64), beta=beta, label_smoothing=noise)
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert gradient.abs().item() < 1e-9
    entropy = -(1 - noise) * math.log(1 - noise) - noise * math.log(noise)
    assert value(loss) == pytest.approx(entropy, rel=1e-6)


@given(log_ratio=ratios, kl=ratios, beta=betas)
def test_kto_pushes_desirable_answers_up_and_others_down(log_ratio: Tensor, kl: Tensor, beta: float) -> None:
    both = log_ratio.repeat(2).requires_grad_()
    point = kl_of_mismatches(kl.requires_grad_().sum(), 1)
    losses = kto_loss(both, torch.tensor([True, False]), point, beta=beta)
    assert losses.sum().item() == pytest.approx(1.0)  # what one gains the other loses
    (gradient,) = torch.autograd.grad(losses.sum(), both)
    assert gradient[0] <= 0 <= gradient[1]
    assert not point.requires_grad


def test_losses_are_finite_where_sigmoids_saturate() -> None:
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    for loss in (
        dpo_loss(far, zero, beta=1.0, label_smoothing=0.1),
        robust_loss(far, zero, beta=1.0, label_smoothing=0.1),
        simpo_loss(far, zero, beta=1.0, gamma=0.5),
        kto_loss(far, torch.tensor([True, False]), torch.tensor(0.0), beta=1.0),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), far)
        assert loss.isfinite().all() and gradient.isfinite().all()
