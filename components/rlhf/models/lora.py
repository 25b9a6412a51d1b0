"""Low-rank adapters (LoRA, Hu et al. 2021): a matrix W is frozen and its update (alpha / rank) B A is trained.

They are injected into a model's layers in place, so that it remains an ordinary transformers model.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from components.rlhf.config.model import LoraConfig
from components.rlhf.models.layers import HEAD_NAME, layers_of, num_layers, require_layers_to_train
from components.rlhf.models.nf4 import LOW_RANK, PACKED, Nf4Linear
from components.rlhf.text.errors import InputError

ADAPTER = "default"  # peft's default adapter name, which is part of the weight names
BELONGS_TO = """# LoRA adapter

peft loads it onto the weights that this stage started from: those of the parent artifact in `../manifest.json` (of SFT the base model, of
PPO the SFT model, of a reward model the one that `reward_model.init` names), {form}.

The model in the folder above has the adapter merged and needs nothing else.
"""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"  # endings of the names in an adapter folder


def add_adapters(lm: Any, lora: LoraConfig, *, num_frozen_layers: int, seed: int) -> None:
    """Freeze lm and add fp32 adapters to the target modules of its layers from num_frozen_layers on.

    B is initialized to 0, so that the output does not change, and A from the seed. A scalar head stays trainable, in fp32.
    Raises InputError for a target module that no layer has.
    """
    import peft  # takes seconds to import, and few runs have adapters

    require_layers_to_train(lm, num_frozen_layers)
    found = {
        name.rpartition(".")[2]
        for layer in layers_of(lm)[num_frozen_layers:]
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if unknown := sorted(set(lora.target_modules) - found):
        raise InputError(
            f"model.lora.target_modules names {', '.join(unknown)}, which no layer of {type(lm).__name__} has; "
            f"choose among {', '.join(sorted(found))}."
        )
    head = getattr(lm, HEAD_NAME, None)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank; it need not be an integer
        target_modules=list(lora.target_modules),
        layers_to_transform=list(range(num_frozen_layers, num_layers(lm))),
        lora_dropout=0.0,  # no dropout: log-probs of the same tokens must not differ
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
    )
    lm.requires_grad_(False)
    peft.inject_adapter_in_model(config, lm, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in _lora_layers(lm):
        a, b = layer.lora_A[ADAPTER].float().weight, layer.lora_B[ADAPTER].float().weight
        bound = 1 / math.sqrt(a.shape[1])  # kaiming_uniform with a = sqrt(5), as in peft and the paper's code
        with torch.no_grad():
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
            b.zero_()
    if head is not None:
        head.float().requires_grad_(True)


@contextlib.contextmanager
def adapters_enabled(lm: nn.Module, *, on: bool) -> Iterator[None]:
    """Run lm with its adapters or, with on False, without them."""
    layers = [] if on else _lora_layers(lm)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_weights(lm: Any, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Merge adapters into a stream of lm's named weights: W + (alpha / rank) B A, under the names of the model without adapters.

    named must be in module order (W, A, B of each layer), as in named_parameters and state_dict, and may come from an engine
    that gathers one weight at a time: only a copy of one layer's W and A is kept. The sum is computed in fp32 and rounded to
    W's dtype. Weights in 4 bits are dequantized first. Without adapters all other weights pass through unchanged.
    """
    scale = lora_scale(lm)
    for stored_name, stored in named:
        if stored_name.endswith(f".{LOW_RANK}"):  # a part of the weight before it
            continue
        name, weight, rounded_to = _dequantized(lm, stored_name, stored)
        layer, is_adapted, rest = name.partition(".base_layer.")
        if is_adapted and rest == "weight":
            merged, dtype = weight.to(torch.float32, copy=True), rounded_to
        elif is_adapted:
            yield f"{layer}.{rest}", weight
        elif ".lora_A." in name:
            a = weight.to(torch.float32, copy=True)
        elif ".lora_B." in name:
            merged += scale * (weight.float() @ a)
            yield name.partition(".lora_B.")[0] + ".weight", merged.to(dtype)
            del merged, a
        else:
            yield name, weight.to(rounded_to)
        del weight, stored  # an engine gathers the next weight before the loop assigns it


def separate_weights(lm: Any, named: Iterable[tuple[str, Tensor]], *, with_base: bool) -> Iterator[tuple[str, Tensor]]:
    """The adapters in a stream of lm's named weights, as NAME.lora_A.weight and, multiplied by alpha / rank, NAME.lora_B.weight.

    with_base adds the weights that they are added to, under the names of the model without adapters.
    """
    scale = lora_scale(lm)
    for name, weight in named:
        if ".lora_A." in name:
            yield name.partition(".lora_A.")[0] + LORA_A, weight
        elif ".lora_B." in name:
            yield name.partition(".lora_B.")[0] + LORA_B, scale * weight.float()
        elif with_base and not name.endswith(f".{LOW_RANK}"):
            base_name, base, dtype = _dequantized(lm, name, weight)
            yield base_name.replace(".base_layer.", "."), base.to(dtype)


def adapted_modules(lm: nn.Module) -> tuple[str, ...]:
    """The names of the modules that have an adapter."""
    return tuple(name for name, module in lm.named_modules() if hasattr(module, "lora_A"))


def _dequantized(lm: nn.Module, name: str, weight: Tensor) -> tuple[str, Tensor, torch.dtype]:
    """A named weight and its dtype; of one in 4 bits the name that it would have otherwise, the values in fp32, and their dtype."""
    owner, _, kind = name.rpartition(".")
    if kind != PACKED:
        return name, weight, weight.dtype
    layer = lm.get_submodule(owner)
    assert isinstance(layer, Nf4Linear)
    if weight.is_meta:
        size = (layer.out_features, layer.in_features)
        return f"{owner}.weight", torch.empty(size, device=weight.device), layer.dtype
    return f"{owner}.weight", layer.dequantized(torch.float32).to(weight.device), layer.dtype


def lora_scale(lm: Any) -> float:
    """alpha / rank of lm's adapters; 0 without adapters."""
    config = getattr(lm, "peft_config", {}).get(ADAPTER)
    return 0.0 if config is None else float(config.lora_alpha / config.r)


def belongs_to_adapter(name: str) -> bool:
    """Whether a weight is of an adapter or a scalar head, which is trained with it."""
    return ".lora_A." in name or ".lora_B." in name or name == f"{HEAD_NAME}.weight"


def save_adapter(lm: Any, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Write the adapter weights, and a scalar head if lm has one, in fp32, and what they belong to.

    peft's PeftModel.from_pretrained loads them onto the weights that the stage started from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": weight.float().contiguous()
        for name, weight in weights.items()
        if belongs_to_adapter(name)
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    lm.peft_config[ADAPTER].save_pretrained(str(directory))
    file = directory / "adapter_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])  # peft writes a set, whose order varies
    content["inference_mode"] = True  # as in peft's own save_pretrained
    content["modules_to_save"] = [HEAD_NAME] if hasattr(lm, HEAD_NAME) else None
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(BELONGS_TO.format(form=_form_of_base(lm)), encoding="utf-8")


def _form_of_base(lm: nn.Module) -> str:
    """In which form the weights of the parent artifact are below the adapters."""
    layers = [module for module in lm.modules() if isinstance(module, Nf4Linear)]
    if not layers or any(layer.low_rank_factors() for layer in layers):
        return "as that artifact has them"
    return (
        "with the linear layers of the decoder quantized to NF4 with double quantization, as bitsandbytes does with "
        '`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`. '
        "On other weights, such as those before quantization, it is another model"
    )


def _lora_layers(lm: nn.Module) -> list[Any]:
    return [module for module in lm.modules() if hasattr(module, "lora_A")]
