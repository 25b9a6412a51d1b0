"""Saving of Hugging Face model folders, with one weight at a time in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.models.lora import ADAPTER, belongs_to_adapter, lora_scale, merged_weights, save_adapter
from components.rlhf.models.nf4 import FOLDER as NF4_FOLDER
from components.rlhf.models.nf4 import Nf4Linear, save_nf4
from components.rlhf.models.stored import StoredForm
from components.rlhf.models.weight_files import WeightFiles
from components.rlhf.text.errors import InputError


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write weights (safetensors, in dtype), config, generation config and tokenizer for from_pretrained.

    weights are those of the model as an engine streams them (of a module that has the model as `lm`), whole and one at a time; without
    them the model's own are written. Buffers keep their precision, in which transformers wants them. Adapters are merged into the
    weights, and also written to adapter/ for peft to load onto the base model. Of a model in 4 bits the merged weights are those that it
    computes with, and nf4/ has the 4 bits and the updates by themselves, from which the next stage starts.
    Raises InputError when a weight is nan or infinite, which the loss cannot show after the last step; then nothing is written.
    """
    if weights is None:
        weights = model.named_parameters()
    else:
        weights = ((name.removeprefix("lm."), weight) for name, weight in weights)
    directory.mkdir(parents=True, exist_ok=True)
    empty = list(_exported(model, _empty(model), dtype))
    form = StoredForm(model, [name for name, _ in empty])
    adapter: dict[str, Tensor] = {}
    files = WeightFiles(directory, form.convert(empty))
    files.write(form.convert(_exported(model, _noting_adapter(model, _finite(weights), adapter), dtype)))
    model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if adapter:
        save_adapter(model, adapter, directory / "adapter")
    if any(isinstance(module, Nf4Linear) for module in model.modules()):
        save_nf4(model, adapter, directory / NF4_FOLDER, adapter=ADAPTER, scale=lora_scale(model))
    for file in directory.rglob("*.safetensors"):  # other pods may run as another user
        file.chmod(0o644)


def _exported(model: Any, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What a folder holds: the parameters, with adapters merged, in dtype, and the buffers that are not computed from the config."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = getattr(model, "all_tied_weights_keys", {})
    for own_name, weight in merged_weights(model, named):
        name = own_name
        # A tied weight comes once, under its first name; folders have it under the name of the embeddings.
        if own_name in tied and model.get_parameter(own_name) is model.get_parameter(tied[own_name]):
            name = tied[own_name]
        if name not in ignored:
            yield name, weight.detach().to(dtype) if weight.is_floating_point() else weight.detach()
        del weight  # here and below: an engine gathers the next weight before the loop assigns it
    stored = model.state_dict().keys() - ignored
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _empty(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters without data, in their whole shape where DeepSpeed has sharded them."""
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        yield name, torch.empty(shape, dtype=parameter.dtype, device="meta")


def _finite(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights. Raises InputError at the end, when every rank has done its part, if some are not finite."""
    nonfinite = []
    for name, weight in named:
        if weight.is_floating_point() and weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
            nonfinite.append(name)
        yield name, weight
        del weight
    if nonfinite:
        raise InputError(
            f"The weights {', '.join(nonfinite[:3])} are not finite after the last step; lower the learning rate."
        )


def _noting_adapter(
    model: Any, named: Iterable[tuple[str, Tensor]], adapter: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights; those of a model's adapter, with a scalar head, are copied to main memory."""
    has_adapter = lora_scale(model) > 0
    for name, weight in named:
        if has_adapter and belongs_to_adapter(name):
            adapter[name] = weight.detach().to("cpu", torch.float32, copy=True)
        yield name, weight
        del weight
