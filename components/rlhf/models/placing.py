"""Puts each weight of a model where it belongs as soon as it is read: its device, its precision, and its share of one rank.

transformers creates a model without memory (on the device meta), converts the tensors of the folder (other names, experts of their own
into one fused tensor) and sets them into the model one after another. Here each is cast, moved and sharded when it has been set, so a
process holds what it keeps, and the tensor that it reads (for fused experts also their parts).
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils

from components.rlhf.models.layers import frozen_modules, require_layers_to_train

Dtypes = Callable[[Any], Mapping[str, torch.dtype]]  # the precision of each parameter of a model, by name
NO_THREADS = (
    "HF_DEACTIVATE_ASYNC_LOAD"  # environment variable of transformers, whose threads would read the whole model ahead
)


class Shard(Protocol):
    """How the weights of a model are sharded over ranks. Every rank calls it for the same parameters, in the same order."""

    def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Cast a parameter that is whole on every rank, and keep only this rank's share; nothing if it is already sharded."""
        ...

    def equal(self, first: nn.Parameter, second: nn.Parameter) -> bool:
        """Whether two sharded parameters have the same values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the weights of one model go."""

    dtypes: Dtypes
    device: torch.device
    shard: Shard | None = None

    @contextlib.contextmanager
    def while_loading(self) -> Iterator[list[Exception]]:
        """Within the block from_pretrained reads one tensor at a time and places it. Yields the error of placing, if there was one."""
        set_parameter, initialize = core_model_loading.set_param_for_module, PreTrainedModel._initialize_missing_keys
        dtypes: dict[str, torch.dtype] = {}
        sharded: dict[str, nn.Parameter] = {}
        errors: list[Exception] = []

        def set_and_place(model: Any, name: str, *args: Any) -> None:
            set_parameter(model, name, *args)
            parameters, leaf = _owner(model, name)
            parameter = parameters.get(leaf)
            if parameter is None or parameter.is_meta:  # a buffer, or of another shape than the model's
                return
            try:
                if not dtypes:
                    dtypes.update(_comparable(model, self.dtypes(model)))
                shape = parameter.shape
                self._place(parameter, dtypes[name])
                if self.shard is not None:
                    sharded[name] = parameter
                    parameters[leaf] = _without_data(shape, parameter)
            except Exception as error:
                errors.append(error)
                raise

        def initialize_missing(model: Any, *args: Any) -> None:
            initialize(model, *args)  # the code of some architectures needs the shapes of weights that are loaded
            for name, parameter in sharded.items():
                parameters, leaf = _owner(model, name)
                parameters[leaf] = parameter

        replaced: list[tuple[Any, str, Any]] = [
            (core_model_loading, "set_param_for_module", set_and_place),
            (PreTrainedModel, "_initialize_missing_keys", initialize_missing),
        ]
        if self.shard is not None:
            replaced.append((modeling_utils, "_tied_params_are_equal", self.shard.equal))
        with _replaced(replaced):
            yield errors

    def settle(self, model: nn.Module) -> None:
        """Place what was not read from the folder or not finally: new heads, tied weights and buffers."""
        dtypes = self.dtypes(model)
        for name, parameter in model.named_parameters():
            self._place(parameter, dtypes[name])
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def _place(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        final = dtype if parameter.is_floating_point() else parameter.dtype
        if self.shard is None:
            parameter.data = parameter.data.to(self.device, final)
        else:
            self.shard(parameter, final)


def trained_dtypes(*, num_frozen_layers: int, frozen: torch.dtype, trained: torch.dtype) -> Dtypes:
    """Frozen modules in one precision and the others in another. Raises InputError when nothing would be left to train."""

    def dtypes(model: Any) -> dict[str, torch.dtype]:
        require_layers_to_train(model, num_frozen_layers)
        modules = frozen_modules(model, num_frozen_layers) if num_frozen_layers else []
        is_frozen = {id(parameter) for module in modules for parameter in module.parameters()}
        return {name: frozen if id(p) in is_frozen else trained for name, p in _parameters(model)}

    return dtypes


def frozen_dtypes(dtype: torch.dtype) -> Dtypes:
    """Everything in one precision."""
    return lambda model: {name: dtype for name, _ in _parameters(model)}


def reference_dtypes(*, num_frozen_layers: int, dtype: torch.dtype) -> Dtypes:
    """Those of a frozen copy of a model that is trained in fp32, without any change of its output under autocast.

    Autocast rounds the weights of linear layers to bf16 in every pass; all other weights stay as in the trained model.
    """
    of_trained = trained_dtypes(num_frozen_layers=num_frozen_layers, frozen=dtype, trained=torch.float32)

    def dtypes(model: Any) -> dict[str, torch.dtype]:
        embeddings = model.get_input_embeddings().weight
        linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
        rounded = linear - {id(embeddings)}
        found = of_trained(model)
        return {name: dtype if id(p) in rounded else found[name] for name, p in _parameters(model)}

    return dtypes


def _comparable(model: Any, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The same, but weights that may be tied have the wider of their precisions until it is known whether their values are equal."""
    found = dict(dtypes)
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        widest = max((dtypes[name] for name in pair), key=lambda dtype: dtype.itemsize)
        found |= dict.fromkeys(pair, widest)
    return found


def _owner(model: nn.Module, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
    """The parameters of the module that a weight belongs to, and the weight's name among them."""
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module)._parameters, leaf


def _without_data(shape: torch.Size, parameter: nn.Parameter) -> nn.Parameter:
    """Stands for a weight that is loaded, with its whole shape."""
    empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
    placeholder: Any = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    placeholder._is_hf_initialized = True  # transformers' flag
    return cast(nn.Parameter, placeholder)


@contextlib.contextmanager
def _replaced(functions: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within the block, functions (owner, name, function) of transformers are replaced, and it loads without threads."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
    environment = os.environ.get(NO_THREADS)
    try:
        os.environ[NO_THREADS] = "1"
        for owner, name, function in functions:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
        if environment is None:
            del os.environ[NO_THREADS]
        else:
            os.environ[NO_THREADS] = environment


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)
