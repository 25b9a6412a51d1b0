"""Adapter-only weight sync to the real vLLM, on a CPU."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.rlhf.config.model import LoraConfig, SamplingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.records import Prompt
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm, trainable_parameters
from components.rlhf.models.lora import adapted_modules, add_adapters
from components.rlhf.rollout import vllm as engine_module
from components.rlhf.rollout.probe import SyncCheck, probe_ids
from components.rlhf.rollout.vllm import VllmRolloutEngine
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.vllm
FP32 = torch.float32
LORA = LoraConfig(rank=4, alpha=12.0, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
PROMPTS = [Prompt(prompt=text) for text in ("a film", "b", "It was a dark and stormy night; " * 5)]


def actor_of(folder: Path, lora: LoraConfig = LORA) -> Actor:
    lm = load_causal_lm(folder, num_frozen_layers=1, dtype=FP32, trainable=False, quantization=lora.quantization)
    add_adapters(lm, lora, num_frozen_layers=1, seed=1)
    return Actor(lm, num_frozen_layers=1, dtype=FP32)


def start(folder: Path, actor: Actor, *, rank: int = 4) -> VllmRolloutEngine:
    return VllmRolloutEngine(
        folder,
        VllmConfig(kv_cache_gib=0.05),
        stop_ids=(0,),
        dtype=FP32,
        max_model_len=220,
        num_sequences=8,
        lora_rank=rank,
        adapted_modules=adapted_modules(actor.lm),
    )


def step(actor: Actor, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(actor):
            parameter += size * torch.randn(parameter.shape, generator=generator)


def named(actor: Actor) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.detach()) for name, parameter in actor.named_parameters())


def sync(engine: VllmRolloutEngine, actor: Actor, check: SyncCheck, *, with_base: bool = False) -> dict[str, Tensor]:
    """One sync that is checked as in PPO; returns what was sent."""
    sent = dict(actor.export_adapters(named(actor), with_base=with_base))
    engine.sync(check.observe(sent.items()))
    verify(engine, actor, check)
    return sent


@torch.no_grad()
def verify(engine: VllmRolloutEngine, actor: Actor, check: SyncCheck) -> None:
    ids = probe_ids(engine.tokenizer)
    expected, _ = actor(collate([ids[:1]], [ids[1:]]), SamplingDistribution())
    found = engine.prompt_logprobs(ids)
    assert torch.allclose(found, expected[0], atol=1e-4)
    check.check(engine.weight_samples(), found, expected[0], version=engine.version)


@torch.no_grad()
def samples_equal_the_trainers(engine: VllmRolloutEngine, actor: Actor) -> None:
    found = engine.generate(PROMPTS, SamplingConfig(max_new_tokens=8), [3, 4, 5])
    batch = collate([c.prompt_ids for c in found], [c.response_ids for c in found])
    logprobs, _ = actor(batch, SamplingDistribution())
    for completion, row in zip(found, logprobs, strict=True):
        assert completion.weight_version == engine.version
        assert completion.logprobs is not None
        assert torch.allclose(completion.logprobs, row[: len(completion.response_ids)], atol=1e-4)


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("lora") / "model", seed=1, hidden_size=128)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmRolloutEngine]:
    engine = start(folder, actor_of(folder))
    yield engine
    engine.close()


def test_adapters_alone_keep_the_engine_in_step_with_the_trainer(engine: VllmRolloutEngine, folder: Path) -> None:
    assert engine.merges_because == ""
    actor, check = actor_of(folder), SyncCheck(FP32)
    verify(engine, actor, check)  # the engine has loaded the weights, and the adapters change nothing yet
    whole = sum(weight.nbytes for _, weight in actor.export_weights(named(actor)))
    for version, size in enumerate((0.1, 1e-6, 0.05, 0.05), start=1):
        step(actor, size, seed=version)
        sent = sync(engine, actor, check)
        assert engine.version == version
        assert all(".lora_" in name for name in sent) and len(sent) == 2 * 2 * 5
        assert sum(weight.nbytes for weight in sent.values()) < whole / 10
        samples_equal_the_trainers(engine, actor)
        # Every adapter is compared by value: the engine holds it under the trainer's name, also in fused layers.
        assert sent.keys() <= engine.weight_samples().keys()


@pytest.mark.parametrize("lost", ["update", "matrix"])
def test_stale_adapter_is_detected_after_a_step_of_1e_6(
    engine: VllmRolloutEngine, folder: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    actor, check = actor_of(folder), SyncCheck(FP32)
    step(actor, 0.1, seed=1)
    sync(engine, actor, check)
    old = dict(actor.export_adapters(named(actor), with_base=False))
    name = "model.layers.1.mlp.up_proj.lora_B.weight"
    step(actor, 1e-6, seed=2)
    if lost == "update":  # requests go on with the old adapter
        monkeypatch.setattr(engine, "_load_adapter", lambda adapters: None)
    else:
        real = engine._load_adapter
        monkeypatch.setattr(engine, "_load_adapter", lambda adapters: real(adapters | {name: old[name]}))
    with pytest.raises(InputError, match=r"weights still have other values, such as model.layers.1.*lora_"):
        sync(engine, actor, check)


def test_first_sync_replaces_the_base_by_the_weights_that_were_quantized(
    engine: VllmRolloutEngine, folder: Path
) -> None:
    actor, check = actor_of(folder, LORA.model_copy(update={"quantization": "nf4"})), SyncCheck(FP32)
    with pytest.raises(AssertionError):
        verify(engine, actor, SyncCheck(FP32))
    step(actor, 0.05, seed=3)
    sent = sync(engine, actor, check, with_base=True)
    assert {name for name in sent if ".lora_" not in name} == {
        name for name, _ in load_causal_lm(folder, num_frozen_layers=0, dtype=FP32).named_parameters()
    }
    samples_equal_the_trainers(engine, actor)
    for seed in (4, 5):
        step(actor, 0.05, seed=seed)
        sync(engine, actor, check)
        samples_equal_the_trainers(engine, actor)


def test_adapters_that_vllm_would_ignore_are_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided when the engine starts; every sync then takes merged weights."""
    monkeypatch.setattr(engine_module, "modules_without_adapter", lambda model, names: list(names)[:1])
    actor, check = actor_of(folder), SyncCheck(FP32)
    engine = start(folder, actor)
    try:
        assert engine.merges_because == "vLLM has no adapters for model.layers.1.self_attn.q_proj"
        for seed in (1, 2):
            step(actor, 0.05, seed=seed)
            engine.sync(check.observe(actor.export_weights(named(actor))))
            verify(engine, actor, check)
            samples_equal_the_trainers(engine, actor)
    finally:
        engine.close()


def test_ranks_and_architectures_without_adapters_in_vllm_have_a_reason() -> None:
    from components.rlhf.rollout.vllm_lora import lora_options, reason_to_merge

    assert reason_to_merge(["LlamaForCausalLM"], 4) == reason_to_merge(["Qwen2ForCausalLM"], 512) == ""
    assert reason_to_merge(["LlamaForCausalLM"], 513) == "vLLM supports no adapters of rank 513"
    assert reason_to_merge(["NewForCausalLM"], 4) == "vLLM supports no adapters for NewForCausalLM"
    ranks: list[Any] = [lora_options(rank, ["q_proj"])["max_lora_rank"] for rank in (1, 4, 9, 300)]
    assert ranks == [1, 8, 16, 320]
