"""What autograd keeps, counted by torch itself, against the formula."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from components.rlhf.config.model import LoraConfig, TrainingConfig
from components.rlhf.data.batching import collate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.lora import add_adapters
from components.rlhf.planner.activations import Pass, saved_activations
from components.rlhf.planner.copies import Numeric
from components.rlhf.planner.sources import shape_from

ROWS, LENGTH = 3, 50
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "autocast": {"bf16": True},
    "bf16 weights": {"bf16": True, "engine": "deepspeed"},
    "LoRA": {"lora": True},
    "LoRA in bf16": {"lora": True, "bf16": True},
    "checkpointed": {"checkpointing": True},
    "checkpointed, bf16 weights": {"checkpointing": True, "bf16": True, "engine": "deepspeed"},
}


def model_of(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=4, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def saved_bytes(
    layers: int, *, bf16: bool = False, engine: str = "torch", lora: bool = False, checkpointing: bool = False
) -> int:
    """Bytes of the tensors that autograd keeps in a forward pass, without the weights and their bf16 copies."""
    lm: Any = model_of(layers)
    if bf16 and (engine == "deepspeed" or lora):
        lm = lm.to(torch.bfloat16)
    if lora:
        add_adapters(lm, LoraConfig(), num_frozen_layers=0, seed=0)
    if checkpointing:
        enable_gradient_checkpointing(lm)
    actor = Actor(lm, num_frozen_layers=0, dtype=torch.bfloat16 if bf16 else torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    shapes = {shape for p in lm.parameters() if p.ndim == 2 for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = tensor
        return tensor

    batch = collate([[5] * 8] * ROWS, [[7] * (LENGTH - 8)] * ROWS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        actor(batch, SamplingDistribution())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", CASES)
def test_kept_activations_are_those_of_the_formula(name: str) -> None:
    case = CASES[name]
    measured = saved_bytes(5, **case) - saved_bytes(3, **case)

    def planned(layers: int) -> int:
        run = Pass(
            shape=shape_from(model_of(layers).config.to_dict(), {}, "llama"),
            tokens=ROWS * LENGTH,
            answer_tokens=0,
            frozen_layers=0,
            lora=LoraConfig() if case.get("lora") else None,
            training=TrainingConfig(
                engine=case.get("engine", "torch"), gradient_checkpointing=case.get("checkpointing", False)
            ),
            numeric=Numeric(bf16=case.get("bf16", False), on_gpu=False),
        )
        return saved_activations(run)

    assert planned(5) - planned(3) == pytest.approx(measured, rel=0.06)
