from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from components.rlhf.data.batching import collate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.probe import SyncCheck, WeightSample, probe_ids, require_other_logprobs
from components.rlhf.text.errors import InputError

FP32, BF16 = torch.float32, torch.bfloat16


def logprobs_check(dtype: torch.dtype, engine: list[float], trainer: list[float]) -> None:
    SyncCheck(dtype).check({}, torch.tensor(engine), torch.tensor(trainer), version=3)


def test_difference_within_tolerance_passes() -> None:
    logprobs_check(FP32, [-1.0, -2.0], [-1.0009, -2.0])
    logprobs_check(BF16, [-1.0, -2.0], [-1.7, -2.0])


@pytest.mark.parametrize("logprob", [-2.002, float("nan"), float("-inf")])
def test_one_different_logprob_fails(logprob: float) -> None:
    with pytest.raises(InputError, match=r"weights \(version 3\) do not match .* differ by .* nats, more than 0.001"):
        logprobs_check(FP32, [-1.0, logprob], [-1.0, -2.0])


def test_nan_in_both_fails() -> None:
    with pytest.raises(InputError):
        logprobs_check(BF16, [float("nan")], [float("nan")])


def test_different_shapes_raise_value_error() -> None:
    with pytest.raises(ValueError, match="log-probs of the engine have shape"):
        SyncCheck(FP32).check({}, torch.zeros(3), torch.zeros(1), version=1)


def test_sample_has_the_first_and_the_last_value_and_is_a_copy() -> None:
    weight = torch.arange(1000.0).reshape(10, 100)
    sample = WeightSample.of(weight)
    weight.zero_()
    assert sample.shape == (10, 100)
    assert len(sample.values) == 256
    assert (sample.values[0], sample.values[-1]) == (0, 999)
    assert WeightSample.of(torch.tensor([4.0, 5.0])).values.tolist() == [4, 5]


class Pair:
    """A trained actor and an engine with its own copy of the model."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        lm = load_causal_lm(folder, num_frozen_layers=0, dtype=dtype)
        self.actor = Actor(lm, num_frozen_layers=0, dtype=dtype)
        copy = load_causal_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False)
        self.engine = HfRolloutEngine(copy, AutoTokenizer.from_pretrained(folder), stop_ids=(0,))
        self.check = SyncCheck(dtype)

    def step(self, size: float) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.actor.lm.parameters():
                weight.add_(size * torch.randn(weight.shape, generator=generator).sign())

    def sync(self, sync: Callable[[Any], Any] | None = None) -> None:
        (sync or self.engine.sync)(self.check.observe(self.actor.lm.named_parameters()))

    def compare(self, *, values: bool = True) -> None:
        """With values False as for an engine that holds every weight in a form of its own."""
        ids = probe_ids(self.engine.tokenizer)
        with torch.no_grad():
            trainer_logprobs, _ = self.actor(collate([ids[:1]], [ids[1:]]), SamplingDistribution())
        samples = self.engine.weight_samples() if values else {}
        self.check.check(samples, self.engine.prompt_logprobs(ids), trainer_logprobs[0], version=self.engine.version)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("values", [True, False], ids=["by values", "by log-probs"])
def test_sync_that_did_nothing_is_detected(tiny_model: Path, dtype: torch.dtype, size: float, values: bool) -> None:
    pair = Pair(tiny_model, dtype)
    pair.sync()
    pair.compare(values=values)
    pair.step(size)
    pair.sync(list)  # the weights are read, but arrive nowhere
    changed = "still have other values" if values else "have changed, but not the log-probs"
    # A large step also shows in the log-probs themselves.
    with pytest.raises(InputError, match=f"{changed}|log-probs of the probe differ"):
        pair.compare(values=values)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e-4, 1e-2])
def test_sync_that_arrived_passes(tiny_model: Path, dtype: torch.dtype, size: float) -> None:
    pair = Pair(tiny_model, dtype)
    pair.sync()
    pair.compare()
    for _ in range(3):
        pair.step(size)
        pair.sync()
        pair.compare()
        pair.compare(values=False)


@pytest.mark.parametrize(
    "lost", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_one_lost_weight_is_detected_and_named(tiny_model: Path, lost: str) -> None:
    pair = Pair(tiny_model, BF16)
    pair.step(1e-2)

    def sync(weights: Any) -> None:
        pair.engine.sync((name, weight) for name, weight in list(weights) if name != lost)

    pair.sync(sync)
    with pytest.raises(InputError, match=f"1 weights still have other values, such as {lost}"):
        pair.compare()


def test_probe_has_64_tokens(tiny_model: Path) -> None:
    assert len(probe_ids(AutoTokenizer.from_pretrained(tiny_model))) == 64


KEPT = "did not load the PPO model: .* log-probs of the model before"


def noisy(logprobs: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    return logprobs + size * torch.randn(logprobs.shape, generator=generator)


@pytest.mark.parametrize("rounding", [0.0, 1e-5, 0.02, 0.3])
@pytest.mark.parametrize("apart", [1e-6, 1e-3, 0.1, 5.0])
def test_second_model_is_told_from_the_first_at_any_distance_and_rounding(rounding: float, apart: float) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        first = -5 * torch.rand(63, generator=generator)
        second = noisy(first, apart, generator)
        before, after, again = (noisy(model, rounding, generator) for model in (first, second, first))
        require_other_logprobs((before, after), (first, second), model="PPO model")
        with pytest.raises(InputError, match=KEPT):
            require_other_logprobs((before, before), (first, second), model="PPO model")
        if apart > 4 * rounding:  # an engine that rounds differently each time
            with pytest.raises(InputError, match=KEPT):
                require_other_logprobs((before, again), (first, second), model="PPO model")


def test_equal_models_need_no_other_logprobs() -> None:
    first, engine = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.1, -2.0, -3.1])
    require_other_logprobs((engine, engine), (first, first), model="PPO model")
    # One token of three differs by the rounding of transformers alone.
    require_other_logprobs((engine, engine), (first, torch.tensor([-1.0, -2.0, -3.001])), model="PPO model")


def test_reload_that_lost_most_of_a_change_is_detected() -> None:
    """An engine that took a tenth of the weights is still nearer to the first model, although all log-probs have changed."""
    generator = torch.Generator().manual_seed(0)
    first = -5 * torch.rand(63, generator=generator)
    second = noisy(first, 0.1, generator)
    before, partly = noisy(first, 0.02, generator), noisy(first + 0.1 * (second - first), 0.02, generator)
    with pytest.raises(InputError, match=KEPT):
        require_other_logprobs((before, partly), (first, second), model="PPO model")
