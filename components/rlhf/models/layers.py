"""Running a part of a decoder's layers, and sharing the frozen lower ones between models.

Law of this room: modules and their loading; no loops over data, no optimisers.

The models stay ordinary transformers models. A part is run through a shallow copy of the decoder that holds the same layer
modules but only some of them, so any decoder of the usual shape (embeddings, `layers`, `norm`) works unchanged.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from components.rlhf.text.errors import InputError

HEAD_NAME = "score"  # transformers' name for the head of a sequence classification model


def decoder_of(model: nn.Module) -> Any:
    """The transformer below the head. Raises InputError for an architecture whose layers cannot be told apart."""
    decoder = model.base_model
    if not (isinstance(getattr(decoder, "layers", None), nn.ModuleList) and hasattr(decoder, "norm")):
        raise InputError(
            f"{type(model).__name__} does not keep its transformer layers in 'layers' and 'norm', which is how they are frozen "
            "and shared here; use a decoder of the Llama, Qwen or Mistral kind."
        )
    return decoder


def num_layers(model: nn.Module) -> int:
    return len(decoder_of(model).layers)


def run_layers(model: nn.Module, inputs: Tensor, *, start: int, stop: int | None) -> Tensor:
    """Hidden states after layers start..stop-1; stop None runs to the end and through the final norm.

    inputs is token ids [B, S] int64 (start 0) or the hidden states [B, S, H] that layers 0..start-1 produced.
    Returns [B, S, H]. Rows are right-padded, which causal attention cannot see, so no attention mask is needed.
    """
    decoder = decoder_of(model)
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)
    part.layers = nn.ModuleList(list(decoder.layers)[start:stop])
    if stop is not None:
        part.norm = nn.Identity()
    source = {"input_ids": inputs} if inputs.dtype == torch.int64 else {"inputs_embeds": inputs}
    hidden: Tensor = part(**source, use_cache=False).last_hidden_state
    return hidden


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only the states between layers for the backward pass, which computes the rest of each layer again."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for layer in decoder_of(model).layers:
        # transformers does it in training mode alone, which nothing here is in (dropout); this flag is the layer's own.
        layer.training = True


def freeze_lower_layers(model: nn.Module, num_frozen: int) -> None:
    """Leave only the layers from num_frozen on (and the final norm and an untied head) to be trained. 0 freezes nothing."""
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
    """Raises InputError when every layer is frozen."""
    total = num_layers(model)
    if num_frozen >= total:
        raise InputError(
            f"model.num_frozen_layers is {num_frozen}, and the model has {total} layers; leave at least one to be trained."
        )


def frozen_modules(model: nn.Module, num_frozen: int) -> list[nn.Module]:
    """The frozen modules: the token embeddings (and with them a tied head) and the lowest layers."""
    decoder = decoder_of(model)
    return [decoder.get_input_embeddings(), *decoder.layers[:num_frozen]]


def share_trunk(owner: nn.Module, others: list[nn.Module], num_frozen: int) -> bool:
    """Let others use owner's frozen modules in place of their own, when their values are equal; say whether they now do.

    All or nothing: with unequal values (a reward model from elsewhere) every model keeps its own trunk.
    """
    if num_frozen == 0:
        return False
    ours = frozen_modules(owner, num_frozen)
    if not all(_equal(ours, frozen_modules(other, num_frozen)) for other in others):
        return False
    for other in others:
        decoder = decoder_of(other)
        head = getattr(other, "lm_head", None)
        tied = head is not None and head.weight is decoder.get_input_embeddings().weight
        decoder.set_input_embeddings(ours[0])
        for index in range(num_frozen):
            decoder.layers[index] = ours[1 + index]
        if tied and head is not None:
            head.weight = ours[0].weight
    return True


def _equal(ours: list[nn.Module], theirs: list[nn.Module]) -> bool:
    # Their numbers are compared too: layers of another architecture may have more parameters (biases), or fewer.
    a, b = ([parameter for module in side for parameter in module.parameters()] for side in (ours, theirs))
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )
