import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.rlhf.config.model import TrainingConfig
from components.rlhf.engine.group import SingleProcess
from components.rlhf.engine.schedule import learning_rate_at
from components.rlhf.engine.torch import TorchEngine
from components.rlhf.text.errors import InputError

X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [-2.0, 0.25], [3.0, 1.0], [0.0, 1.0], [1.5, -0.5]])
Y = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, 1.0])


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def engine_of(module: nn.Module, *, num_steps: int = 10, **training: Any) -> TorchEngine:
    defaults = {"learning_rate": 0.1, "schedule": "constant", "warmup_fraction": 0.0}
    return TorchEngine(module, TrainingConfig(**(defaults | training)), num_steps=num_steps)


def loss_of(module: nn.Module, rows: Tensor) -> Tensor:
    """The share of these rows in the mean over all rows."""
    return ((module(X[rows]).squeeze(1) - Y[rows]) ** 2).sum() / len(X)


def one_step(engine: TorchEngine, sizes: list[int]) -> Any:
    for number, rows in enumerate(parts := torch.arange(len(X)).split(sizes), start=1):
        engine.backward(loss_of(engine.module, rows), last=number == len(parts))
    return engine.step()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def save(engine: TorchEngine, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(engine.snapshot(), folder / "engine-00000.safetensors")


def gap(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("sizes", [[1] * 6, [3, 3], [1, 5], [4, 2]])
def test_microbatches_add_up_to_one_batch(sizes: list[int]) -> None:
    whole, parts = engine_of(model()), engine_of(model())
    for _ in range(3):
        one, many = one_step(whole, [6]), one_step(parts, sizes)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert gap(whole.module, parts.module) < 1e-5


def test_first_step_of_adam_by_hand() -> None:
    """Bias-corrected moments of one gradient g are g and g^2: the step is rate * g / (|g| + eps) = rate * sign(g)."""
    engine = engine_of(model(), max_grad_norm=0.0)
    before = weights(engine.module)
    gradients = torch.autograd.grad(loss_of(engine.module, torch.arange(6)), list(engine.module.parameters()))
    one_step(engine, [6])
    for (name, p), gradient in zip(engine.module.named_parameters(), gradients, strict=True):
        assert torch.allclose(p, before[name] - 0.1 * gradient.sign(), atol=1e-5), name


def test_two_steps_of_adam_by_hand() -> None:
    """Adam with betas 0.9 and 0.95, on f(x) = c x with another slope c a step, with decay."""
    weight = nn.Parameter(torch.tensor([2.0]))
    module = nn.ParameterList([weight])
    engine = engine_of(module, weight_decay=0.5, max_grad_norm=0.0)
    x, m, v = 2.0, 0.0, 0.0
    for step, slope in enumerate([3.0, -1.0], start=1):
        engine.backward((slope * weight).sum(), last=True)
        engine.step()
        m, v = 0.9 * m + 0.1 * slope, 0.95 * v + 0.05 * slope**2
        x -= 0.1 * 0.5 * x  # decoupled decay
        x -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.95**step)) + 1e-8)
        assert weight.item() == pytest.approx(x, rel=1e-6)


class EqualRanks(SingleProcess):
    """A group of ranks that all have the same gradients; remembers the sizes of what it sums."""

    world_size = 3

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def sum(self, x: Tensor) -> Tensor:
        self.sizes.append(x.numel())
        return 3 * x


@pytest.mark.parametrize(("bucket", "sizes"), [(10_000, [19]), (12, [10, 9]), (8, [2, 8, 8, 1]), (1, [8, 4, 4, 1, 2])])
def test_gradients_are_summed_over_ranks_in_buckets(
    bucket: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.rlhf.engine.torch.BUCKET", bucket)
    module = model()
    module.register_parameter("unused", nn.Parameter(torch.ones(2)))  # without a gradient
    group = EqualRanks()
    engine = TorchEngine(module, TrainingConfig(max_grad_norm=0.0, learning_rate=0.1), num_steps=10, group=group)
    engine.backward(loss_of(module, torch.arange(6)), last=True)
    own = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    engine._sum_gradients()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, 3 * own[name]), name
    assert sum(group.sizes) == 19 and sorted(group.sizes) == sorted(sizes)


def test_gradients_are_cleared_after_the_step() -> None:
    engine = engine_of(model())
    one_step(engine, [6])
    assert all(p.grad is None for p in engine.module.parameters())


def test_parameters_without_gradient_do_not_change() -> None:
    module = model()
    module[0].requires_grad_(False)
    before = weights(module)
    engine = engine_of(module, weight_decay=0.5)
    one_step(engine, [6])
    assert torch.equal(module[0].weight, before["0.weight"])
    assert not torch.equal(module[2].weight, before["2.weight"])
    assert set(engine.parameters) == {"2.weight", "2.bias"}


# The gradient of 3a + 4b is (3, 4), of norm 5.


def step(max_grad_norm: float) -> tuple[float, list[float]]:
    module = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
    engine = engine_of(module, max_grad_norm=max_grad_norm)
    engine.backward((3 * module[0] + 4 * module[1]).sum(), last=True)
    info = engine.step()
    # Adam's first moment after one step is a tenth of the gradient that it was given.
    return info.grad_norm, [engine.optimizer.state[p]["exp_avg"].item() * 10 for p in module]


def test_long_gradients_are_scaled_to_max_grad_norm() -> None:
    norm, gradient = step(1.0)
    assert norm == 5.0  # before clipping
    assert gradient == pytest.approx([0.6, 0.8], rel=1e-4)


@pytest.mark.parametrize("limit", [0.0, 5.1, 100.0])
def test_short_gradients_are_not_scaled_and_0_disables_clipping(limit: float) -> None:
    norm, gradient = step(limit)
    assert norm == 5.0
    assert gradient == pytest.approx([3.0, 4.0], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_changes_no_weight(bad: float) -> None:
    engine = engine_of(model())
    one_step(engine, [6])
    weights_before, moments_before = weights(engine.module), moments(engine)
    engine.backward(loss_of(engine.module, torch.arange(6)) * bad, last=True)
    assert not math.isfinite(engine.step().grad_norm)
    assert all(torch.equal(p, weights_before[name]) for name, p in engine.module.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(moments(engine), moments_before, strict=True))
    assert all(p.grad is None for p in engine.module.parameters())


def moments(engine: TorchEngine) -> list[Tensor]:
    state = engine.optimizer.state
    return [value.clone() for p in engine.module.parameters() for value in state[p].values()]


# Ten steps with a peak of 8; the step counts from 0.


@pytest.mark.parametrize(
    ("schedule", "warmup", "floor", "expected"),
    [
        ("constant", 0.0, 0.0, {0: 8, 5: 8, 9: 8, 50: 8}),
        ("linear", 0.0, 0.0, {0: 8, 5: 4, 9: 0.8, 10: 0, 50: 0}),
        ("linear", 0.0, 0.5, {0: 8, 5: 6, 10: 4, 50: 4}),
        ("cosine", 0.0, 0.0, {0: 8, 5: 4, 10: 0, 50: 0}),
        ("cosine", 0.0, 0.1, {0: 8, 5: 0.8 + 7.2 / 2, 10: 0.8, 50: 0.8}),
        # Warm-up of 3 of 10 steps: a quarter, a half, three quarters, then the peak.
        ("constant", 0.3, 0.0, {0: 2, 1: 4, 2: 6, 3: 8, 9: 8}),
        ("linear", 0.3, 0.0, {0: 2, 2: 6, 3: 8, 10: 0}),
        ("cosine", 0.21, 0.0, {0: 2, 2: 6, 3: 8, 10: 0}),  # a fraction of a warm-up step counts as a whole one
    ],
)
def test_learning_rate_schedules_by_hand(
    schedule: str, warmup: float, floor: float, expected: dict[int, float]
) -> None:
    training = TrainingConfig(schedule=schedule, warmup_fraction=warmup, min_learning_rate_fraction=floor)
    rates = {step: learning_rate_at(step, training, peak=8.0, num_steps=10) for step in expected}
    assert rates == pytest.approx(expected, abs=1e-12)


def test_cosine_schedule_after_a_quarter() -> None:
    training = TrainingConfig(schedule="cosine", warmup_fraction=0.0, min_learning_rate_fraction=0.0)
    assert learning_rate_at(2, training, peak=1.0, num_steps=8) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_steps_follow_the_schedule_and_report_it() -> None:
    engine = engine_of(model(), num_steps=4, schedule="linear", min_learning_rate_fraction=0.0, learning_rate=0.4)
    assert [one_step(engine, [6]).learning_rate for _ in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_the_peak_may_be_changed_between_steps() -> None:
    training = TrainingConfig(learning_rate=0.1, schedule="constant", warmup_fraction=0.0)
    engine = TorchEngine(model(), training, num_steps=4)
    assert one_step(engine, [6]).learning_rate == 0.1
    engine.peak = 0.7
    assert one_step(engine, [6]).learning_rate == 0.7


def test_learning_rate_0_changes_nothing() -> None:
    engine = engine_of(model(), num_steps=1, schedule="linear", min_learning_rate_fraction=0.0)
    one_step(engine, [6])
    before = weights(engine.module)
    assert one_step(engine, [6]).learning_rate == 0.0
    assert all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())


def test_loaded_engine_continues_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_steps": 6, "schedule": "cosine", "warmup_fraction": 0.2, "weight_decay": 0.1}
    straight = engine_of(model(), **options)
    rates = [one_step(straight, [2, 4]).learning_rate for _ in range(6)]
    first = engine_of(model(), **options)
    for _ in range(3):
        one_step(first, [2, 4])
    save(first, tmp_path / "deep" / "actor")
    second = engine_of(model(seed=9), **options)
    second.load(tmp_path / "deep" / "actor")
    assert [one_step(second, [2, 4]).learning_rate for _ in range(3)] == rates[3:]
    assert gap(straight.module, second.module) == 0.0


def test_snapshot_is_a_copy(tmp_path: Path) -> None:
    engine = engine_of(model())
    one_step(engine, [6])
    before = engine.snapshot()
    kept = {name: value.clone() for name, value in before.items()}
    one_step(engine, [6])
    assert all(torch.equal(value, kept[name]) for name, value in before.items())
    assert not torch.equal(engine.snapshot()["weight/0.weight"], before["weight/0.weight"])


def test_snapshot_before_the_first_step(tmp_path: Path) -> None:
    save(engine_of(model()), tmp_path)
    loaded, fresh = engine_of(model(seed=9)), engine_of(model())
    loaded.load(tmp_path)
    one_step(loaded, [6])
    one_step(fresh, [6])
    assert gap(loaded.module, fresh.module) == 0.0


def test_snapshot_holds_only_trained_weights(tmp_path: Path) -> None:
    module = model()
    module[0].requires_grad_(False)
    save(engine_of(module), tmp_path)
    other = model(seed=9)
    other[0].requires_grad_(False)
    first = other[0].weight.clone()
    engine_of(other).load(tmp_path)
    assert torch.equal(other[0].weight, first)
    assert torch.equal(other[2].weight, module[2].weight)


def test_snapshot_of_other_parameters_is_refused(tmp_path: Path) -> None:
    save(engine_of(model()), tmp_path)
    fewer = model(seed=9)
    fewer[0].requires_grad_(False)
    before = weights(fewer)
    with pytest.raises(InputError, match="holds a different set of trained weights"):
        engine_of(fewer).load(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in fewer.named_parameters())


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        torch.manual_seed(0)
        a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        b.weight = a.weight
        return nn.ModuleDict({"a": a, "b": b})

    engine = engine_of(tied())
    save(engine, tmp_path)
    again = engine_of(tied())
    again.load(tmp_path)
    assert [name for name, _ in again.full_weights()] == ["a.weight"]
    assert again.module["b"].weight is again.module["a"].weight


def test_full_weights_are_complete_and_detached() -> None:
    module = model()
    module[0].requires_grad_(False)
    found = dict(engine_of(module).full_weights())
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not any(weight.requires_grad for weight in found.values())
    assert found["2.weight"].data_ptr() == module[2].weight.data_ptr()  # no copy


def test_single_process_reductions_are_identities() -> None:
    group = SingleProcess()
    assert (group.rank, group.world_size, group.max_int(3)) == (0, 1, 3)
    assert group.sum(torch.tensor(2.0)).item() == 2.0
    group.barrier()
