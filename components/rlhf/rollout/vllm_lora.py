"""LoRA adapters in vLLM 0.32: the base weights stay in the engine, and only the adapters of the trainer are loaded at each sync."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.rlhf.models.lora import LORA_A, LORA_B
from components.rlhf.rollout.probe import WeightSample

PREFIX = "base_model.model."  # of the names in an adapter folder of peft


def reason_to_merge(architectures: Sequence[str], rank: int) -> str:
    """Why this architecture cannot have adapters of this rank in vLLM; empty if it can."""
    from vllm.config.lora import MaxLoRARanks
    from vllm.model_executor.models import ModelRegistry, supports_lora

    if not any(rank <= limit for limit in get_args(MaxLoRARanks)):
        return f"vLLM supports no adapters of rank {rank}"
    known = next((ModelRegistry.models[name] for name in architectures if name in ModelRegistry.models), None)
    if known is None or not supports_lora(known.load_model_cls()):
        return f"vLLM supports no adapters for {', '.join(architectures)}"
    return ""


def lora_options(rank: int, target_modules: Iterable[str]) -> dict[str, Any]:
    """The engine's options for one adapter at a time, on these modules."""
    from vllm.config.lora import MaxLoRARanks

    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,  # an adapter of an earlier version is dropped
        "max_lora_rank": min(limit for limit in get_args(MaxLoRARanks) if limit >= rank),
        "lora_target_modules": sorted(target_modules),
    }


def modules_without_adapter(model: Any, names: Iterable[str]) -> list[str]:
    """Of the trainer's adapted modules those for which vLLM would ignore an adapter."""
    found = set(_slices(model))
    return [name for name in names if _name_in_vllm(model, name) not in found]


def split_adapters(weights: Iterable[tuple[str, Tensor]], adapters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights without those of adapters, which are copied to `adapters`."""
    for name, weight in weights:
        if name.endswith((LORA_A, LORA_B)):
            adapters[name] = weight.detach().to("cpu", torch.float32, copy=True)
        else:
            yield name, weight


def write_adapter(folder: Path, adapters: Mapping[str, Tensor]) -> None:
    """Write a folder that vLLM loads. B has its scale already, so that alpha / r is 1."""
    folder.mkdir()
    rank = len(next(weight for name, weight in adapters.items() if name.endswith(LORA_A)))
    modules = sorted({name.removesuffix(LORA_A).rpartition(".")[2] for name in adapters if name.endswith(LORA_A)})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {f"{PREFIX}{name}": weight.contiguous() for name, weight in adapters.items()},
        folder / "adapter_model.safetensors",
    )


def sample_adapter(model: Any, number: int, names: Iterable[str]) -> dict[str, WeightSample]:
    """Values of adapter `number` in the engine, under the trainer's names; nothing if the engine does not have it.

    With tensor parallelism a rank has a part of some matrices, whose shape then differs.
    """
    slots = model.lora_manager.lora_index_to_id
    if number not in slots:
        return {}
    slot, slices, samples = slots.index(number), _slices(model), {}
    for name in names:
        layer, index = slices[_name_in_vllm(model, name)]
        rank = model.lora_manager.get_adapter(number).rank
        samples[f"{name}{LORA_A}"] = WeightSample.of(layer.lora_a_stacked[index][slot, 0, :rank])
        samples[f"{name}{LORA_B}"] = WeightSample.of(layer.lora_b_stacked[index][slot, 0, :, :rank])
    return samples


def _slices(model: Any) -> dict[str, tuple[Any, int]]:
    """vLLM's layers with adapters by the name of each module that they compute, with its place in a fused layer."""
    from vllm.lora.layers import BaseLayerWithLoRA

    found: dict[str, tuple[Any, int]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BaseLayerWithLoRA) and hasattr(layer, "lora_a_stacked"):
            parent, _, own = path.rpartition(".")
            packed = model.lora_manager.packed_modules_mapping.get(own) or [own]
            if len(packed) == len(layer.lora_a_stacked):
                found |= {f"{parent}.{name}": (layer, index) for index, name in enumerate(packed)}
    return found


def _name_in_vllm(model: Any, name: str) -> str:
    """The name of a module as vLLM's loader of adapters maps it."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = None if mapper is None else mapper.get_rename_mapper()
    return str(parse_fine_tuned_lora_name(f"{PREFIX}{name}{LORA_A}", renames)[0])
