"""Tests that need a GPU, skipped without one. benchmarks/gpu.py prints the underlying measurements."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import SEQUENCES, Steps, make_model, train
from components.rlhf.config.model import SamplingConfig, TrainingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.records import Prompt
from components.rlhf.models.loading import load_causal_lm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gpu"))


def steps(model: Path, **changes: Any) -> Steps:
    return train(model, TrainingConfig(learning_rate=1e-4, **changes))


def test_gradient_checkpointing_saves_memory_without_changing_results(model: Path) -> None:
    plain, checkpointed = (steps(model, gradient_checkpointing=on) for on in (False, True))
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-3)
    assert checkpointed.peak_bytes < 0.8 * plain.peak_bytes


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_like_torch(model: Path, stage: int) -> None:
    found = steps(model, engine="deepspeed", zero_stage=stage).losses
    assert found[-1] < found[0]
    assert found == pytest.approx(steps(model).losses, rel=0.02)


def test_vllm_sleeps_wakes_and_syncs_weights(model: Path) -> None:
    from components.rlhf.rollout.vllm import VllmRolloutEngine

    engine = VllmRolloutEngine(
        model, VllmConfig(), stop_ids=(0,), dtype=torch.bfloat16, max_model_len=256, num_sequences=SEQUENCES
    )
    awake = torch.cuda.mem_get_info()[0]
    sampling = SamplingConfig(max_new_tokens=16, batch_size=SEQUENCES)
    engine.generate([Prompt(prompt="It is")], sampling, [0])
    assert torch.cuda.mem_get_info()[0] > awake + 2**30  # asleep
    lm = load_causal_lm(model, num_frozen_layers=0, dtype=torch.bfloat16, trainable=False).to("cuda")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.1)
    ids = [5, 6, 7, 8, 9, 10]
    before = engine.prompt_logprobs(ids)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, parameter.detach()) for name, parameter in lm.named_parameters())

    engine.sync(weights())
    logprobs = lm(torch.tensor([ids], device="cuda")).logits.float().log_softmax(-1)[0, :-1]
    expected = logprobs.gather(1, torch.tensor(ids[1:], device="cuda")[:, None]).squeeze(1).cpu()
    after = engine.prompt_logprobs(ids)
    engine.close()
    assert (after - expected).abs().max() < 0.3
    assert (after - before).abs().max() > (after - expected).abs().max()
