"""Runs a range of a decoder's layers, and shares the frozen lower ones between models.

The models remain ordinary transformers models. A range runs through a shallow copy of the decoder with only those layer
modules, so any decoder of the usual structure (embeddings, `layers`, `norm`) works unchanged.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from components.rlhf.text.errors import InputError

HEAD_NAME = "score"  # transformers' name for the head of a sequence classification model


def decoder_of(model: nn.Module) -> Any:
    """The transformer below the head. Raises InputError for an architecture without `layers` and `norm`."""
    decoder = model.base_model
    if not (isinstance(getattr(decoder, "layers", None), nn.ModuleList) and hasattr(decoder, "norm")):
        raise InputError(
            f"{type(model).__name__} does not keep its transformer layers in 'layers' and 'norm', so they cannot be frozen or "
            "shared; use a decoder such as Llama, Qwen or Mistral."
        )
    return decoder


def num_layers(model: nn.Module) -> int:
    return len(decoder_of(model).layers)


def run_layers(model: nn.Module, inputs: Tensor, *, start: int, stop: int | None) -> Tensor:
    """Hidden states after layers start..stop-1; stop None runs all remaining layers and the final norm.

    inputs is token ids [B, S] int64 (start 0) or the hidden states [B, S, H] after layers 0..start-1.
    Returns [B, S, H]. Padding is on the right, where causal attention cannot see it, so no attention mask is needed.
    """
    decoder = decoder_of(model)
    partial = copy.copy(decoder)
    partial._modules = dict(decoder._modules)
    partial.layers = nn.ModuleList(list(decoder.layers)[start:stop])
    if stop is not None:
        partial.norm = nn.Identity()
    kwargs = {"input_ids": inputs} if inputs.dtype == torch.int64 else {"inputs_embeds": inputs}
    hidden: Tensor = partial(**kwargs, use_cache=False).last_hidden_state
    return hidden


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only the hidden states between layers; the backward pass recomputes the rest of each layer."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for layer in decoder_of(model).layers:
        # transformers checkpoints only in training mode; set the flag of the layer but not of its dropout modules.
        layer.training = True


def freeze_lower_layers(model: nn.Module, num_frozen: int) -> None:
    """Freeze the embeddings and the lowest num_frozen layers; the final norm and an untied head stay trainable. 0 freezes nothing."""
    if num_frozen == 0:
        return
    total = num_layers(model)
    if num_frozen > total:
        raise InputError(
            f"model.num_frozen_layers is {num_frozen}, but the model has {total} layers; choose at most {total - 1}."
        )
    for module in frozen_modules(model, num_frozen):
        module.requires_grad_(False)


def require_layers_to_train(model: nn.Module, num_frozen: int) -> None:
    """Raise InputError when every layer is frozen."""
    total = num_layers(model)
    if num_frozen >= total:
        raise InputError(
            f"model.num_frozen_layers is {num_frozen}, but the model has {total} layers; leave at least one trainable."
        )


def frozen_modules(model: nn.Module, num_frozen: int) -> list[nn.Module]:
    """The frozen modules: the token embeddings (and with them a tied head) and the lowest layers."""
    decoder = decoder_of(model)
    return [decoder.get_input_embeddings(), *decoder.layers[:num_frozen]]


def share_trunk(owner: nn.Module, others: list[nn.Module], num_frozen: int) -> bool:
    """Replace the frozen modules of others with those of owner if all values are equal; return whether they were.

    With unequal values (a reward model from another base) every model keeps its own trunk.
    """
    if num_frozen == 0:
        return False
    shared = frozen_modules(owner, num_frozen)
    if not all(_equal(shared, frozen_modules(other, num_frozen)) for other in others):
        return False
    for other in others:
        decoder = decoder_of(other)
        head = getattr(other, "lm_head", None)
        tied = head is not None and head.weight is decoder.get_input_embeddings().weight
        decoder.set_input_embeddings(shared[0])
        for index in range(num_frozen):
            decoder.layers[index] = shared[1 + index]
        if tied and head is not None:
            head.weight = shared[0].weight
    return True


def _equal(first: list[nn.Module], second: list[nn.Module]) -> bool:
    # Compare the counts too: layers of another architecture may have more parameters (biases) or fewer.
    a, b = ([parameter for module in modules for parameter in module.parameters()] for modules in (first, second))
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )
