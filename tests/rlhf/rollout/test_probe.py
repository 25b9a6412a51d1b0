from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from components.rlhf.data.batching import collate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.probe import check_sync, probe_ids
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_model


def test_difference_within_tolerance_passes() -> None:
    check_sync(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0009, -2.0]), tolerance=1e-3, version=3)


@pytest.mark.parametrize("logprob", [-2.002, float("nan"), float("-inf")])
def test_one_different_logprob_fails(logprob: float) -> None:
    with pytest.raises(InputError, match=r"weights \(version 3\) do not match .* differ by .* nats, more than 0.001"):
        check_sync(torch.tensor([-1.0, logprob]), torch.tensor([-1.0, -2.0]), tolerance=1e-3, version=3)


def test_nan_fails() -> None:
    with pytest.raises(InputError):
        check_sync(torch.tensor([float("nan")]), torch.tensor([float("nan")]), tolerance=1e9, version=1)


def test_different_shapes_raise_value_error() -> None:
    with pytest.raises(ValueError, match="log-probs of the engine have shape"):
        check_sync(torch.zeros(3), torch.zeros(1), tolerance=1.0, version=1)


def test_probe_of_hf_engine_detects_other_weights(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    engine = HfRolloutEngine(lm, tokenizer, stop_ids=(0,))
    ids = probe_ids(tokenizer)
    new = load_causal_lm(make_tiny_model(tmp_path, seed=7), num_frozen_layers=0, dtype=torch.float32)
    actor = Actor(new, num_frozen_layers=0, dtype=torch.float32)
    with torch.no_grad():
        trainer_logprobs = actor(collate([ids[:1]], [ids[1:]]), SamplingDistribution())[0][0]
    with pytest.raises(InputError, match="version 0"):
        check_sync(engine.prompt_logprobs(ids), trainer_logprobs, tolerance=1e-3, version=engine.version)
    engine.sync(new.named_parameters())
    engine_logprobs = engine.prompt_logprobs(ids)
    assert engine_logprobs.shape == (len(ids) - 1,) and engine_logprobs.dtype == torch.float32
    check_sync(engine_logprobs, trainer_logprobs, tolerance=1e-4, version=engine.version)


def test_probe_has_64_tokens(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert len(probe_ids(tokenizer)) == 64
