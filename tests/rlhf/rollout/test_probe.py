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


class TestCheckSync:
    def test_agreement_within_the_tolerance_passes(self) -> None:
        check_sync(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0009, -2.0]), tolerance=1e-3, version=3)

    @pytest.mark.parametrize("other", [-2.002, float("nan"), float("-inf")])
    def test_one_log_prob_that_differs_is_enough(self, other: float) -> None:
        with pytest.raises(InputError, match="The sync of version 3 did not take: .* differ by .* more than 0.001"):
            check_sync(torch.tensor([-1.0, other]), torch.tensor([-1.0, -2.0]), tolerance=1e-3, version=3)

    def test_no_number_agrees_with_nan(self) -> None:
        with pytest.raises(InputError):
            check_sync(torch.tensor([float("nan")]), torch.tensor([float("nan")]), tolerance=1e9, version=1)

    def test_two_different_probes_are_a_bug(self) -> None:
        with pytest.raises(ValueError, match="scored"):
            check_sync(torch.zeros(3), torch.zeros(1), tolerance=1.0, version=1)


class TestHfEngine:
    def test_scores_as_the_trainer_does_and_tells_another_model(self, tiny_model: Path, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32, trainable=False)
        engine = HfRolloutEngine(lm, tokenizer, stop_ids=(0,))
        ids = probe_ids(tokenizer)
        new = load_causal_lm(make_tiny_model(tmp_path, seed=7), num_frozen_layers=0, dtype=torch.float32)
        actor = Actor(new, num_frozen_layers=0, dtype=torch.float32)
        with torch.no_grad():
            trainers = actor(collate([ids[:1]], [ids[1:]]), SamplingDistribution())[0][0]
        with pytest.raises(InputError, match="version 0"):
            check_sync(engine.prompt_logprobs(ids), trainers, tolerance=1e-3, version=engine.version)
        engine.sync(new.named_parameters())
        found = engine.prompt_logprobs(ids)
        assert found.shape == (len(ids) - 1,) and found.dtype == torch.float32
        check_sync(found, trainers, tolerance=1e-4, version=engine.version)


def test_the_probe_is_as_long_as_it_may_be(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert len(probe_ids(tokenizer)) == 64
