"""Runs a range of a model's layers, applies its head, and shares frozen lower layers between models.

Nothing of the forward pass is written again here, because architectures differ in their embeddings (scales), masks (sliding
windows), positions (a RoPE per kind of layer) and logits (scales, soft caps). A range runs as the decoder's own forward in
which the other layers are replaced by stand-ins, so every layer keeps its index; the head runs as the model's own forward in
which the decoder is replaced by a stand-in that returns given hidden states. components.rlhf.models.conformance checks for a
model that both give what its plain forward gives.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from components.rlhf.text.errors import InputError

# Entries of a config that do not change hidden states.
NOT_COMPUTED = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "tie_word_embeddings", "use_cache",
    "num_labels", "id2label", "label2id", "problem_type", "reward_mean", "reward_std", "scored_as", "head_name", "padding_side",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
HEAD_NAME = "score"  # transformers' name for the head of a sequence classification model


def decoder_of(model: Any) -> Any:
    """The module that turns token ids into the hidden states that the head reads. Raises InputError if there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        # transformers finds it by the names of its attributes, which some architectures use for other things.
        children = [module for module in model.children() if isinstance(module, PreTrainedModel)]
        if not children:
            raise InputError(f"{type(model).__name__} has no decoder below its head; choose another architecture.")
        decoder = children[0]
    return decoder


def num_layers(model: Any) -> int:
    """The number of transformer layers. Raises InputError if the config does not say."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(number, int):
        raise InputError(
            f"config.json of {type(model).__name__} has no num_hidden_layers; choose another architecture."
        )
    return number


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of transformer layers, whatever its name. Raises InputError for an architecture without such a list."""
    return _layers_in(decoder_of(model))[1]


def run_layers(
    model: nn.Module,
    input_ids: Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    states: Tensor | None = None,
    **options: Any,
) -> Any:
    """The decoder's output for input_ids [B, S] int64, of the layers start..stop-1 only.

    states [B, S, H] are the hidden states after layers 0..start-1, and needed if start > 0. With a stop, the result is the hidden
    states [B, S, H] after layer stop-1; without, the decoder's output object, whose last_hidden_state is after the final norm.
    Padding is on the right, where causal attention cannot see it, so no attention mask is needed.
    """
    decoder = decoder_of(model)
    if start == 0 and stop is None:
        return decoder(input_ids=input_ids, use_cache=False, **options)
    maybe_install_capturing_hooks(decoder)  # otherwise transformers would install them again in every copy below
    path, layers = _layers_in(decoder)
    last = len(layers) if stop is None else stop
    if last == 0:
        raise ValueError("no layers to run")
    replaced: list[nn.Module] = list(layers)
    for index in [*range(start), *range(last, len(layers))]:
        replaced[index] = _Skip(layers[index])
    if start:
        replaced[start - 1] = _Skip(layers[start - 1], states)
    recorder = _Record(layers[last - 1]) if stop is not None and start < last else None
    if recorder is not None:
        replaced[last - 1] = recorder
    output = _with_child(decoder, path, nn.ModuleList(replaced))(input_ids=input_ids, use_cache=False, **options)
    if stop is None:
        return output
    return states if recorder is None else recorder.states


def apply_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H] after the final norm, with every scale and soft cap of the model's own forward."""
    logits: Tensor = run_head(model, Output(last_hidden_state=hidden[None])).logits[0]
    return logits


def run_head(model: nn.Module, output: "Output", **options: Any) -> Any:
    """The output of the model's own forward pass, given the output of its decoder."""
    decoder = decoder_of(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    hidden = output.last_hidden_state
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    # forward, not __call__: hooks on the model are those of a whole forward pass.
    return _with_child(model, path.split("."), _ReturnOutput(decoder, output)).forward(input_ids=ids, **options)


def enable_gradient_checkpointing(model: Any) -> None:
    """Keep only the hidden states between layers; the backward pass recomputes the rest of each layer. Raises InputError."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise InputError(
            f"{type(model).__name__} does not support gradient checkpointing; set training.gradient_checkpointing to false."
        ) from None
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # transformers checkpoints only in training mode; set the flag of the layer but not of its dropout modules.
            module.training = True
            # Some layers apply dropout themselves, with a rate of their own or of the config.
            for owner in (module, getattr(module, "config", None)):
                for name, value in vars(owner).items() if owner is not None else ():
                    if "drop" in name and isinstance(value, float):
                        setattr(owner, name, 0.0)


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
    """The frozen modules: every embedding of the decoder (with that of the tokens a tied head) and the lowest layers."""
    decoder = decoder_of(model)
    embeddings = [module for _, module in _embeddings(decoder)]
    return [*embeddings, *layers_of(model)[:num_frozen]]


@torch.no_grad()
def share_trunk(owner: Any, others: list[Any], num_frozen: int) -> bool:
    """Replace the frozen modules of others with those of owner if they compute the same; return whether they do.

    They compute the same if all weights are equal and the frozen layers have the same output for the same tokens, which also
    depends on the config (RoPE, windows, scales). Otherwise (a reward model from another base) every model keeps its own trunk.
    """
    if num_frozen == 0:
        return False
    shared = frozen_modules(owner, num_frozen)
    if not all(_same_computation(owner, other, num_frozen) for other in others):
        return False
    for other in others:
        decoder, layers = decoder_of(other), layers_of(other)
        embeddings = decoder.get_input_embeddings()
        head = other.get_output_embeddings() if hasattr(other, "get_output_embeddings") else None
        tied = head is not None and head.weight is embeddings.weight
        for (path, _), module in zip(_embeddings(decoder), shared, strict=False):
            decoder.get_submodule(".".join(path[:-1]))._modules[path[-1]] = module
        for index in range(num_frozen):
            layers[index] = shared[len(shared) - num_frozen + index]
        if tied and head is not None:
            head.weight = decoder.get_input_embeddings().weight
    return True


def _same_computation(owner: Any, other: Any, num_frozen: int) -> bool:
    first, second = ([p for m in frozen_modules(model, num_frozen) for p in m.parameters()] for model in (owner, other))
    # Compare the counts too: layers of another architecture may have more parameters (biases) or fewer.
    if len(first) != len(second) or not all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(first, second, strict=True)
    ):
        return False
    # The probe below is shorter than most windows, so compare what the configs say too.
    configs = [
        {key: value for key, value in model.config.get_text_config().to_dict().items() if key not in NOT_COMPUTED}
        for model in (owner, other)
    ]
    if configs[0] != configs[1]:
        return False
    vocab_size = int(owner.config.get_text_config().vocab_size)
    ids = (torch.arange(48, device=first[0].device) * 7919 % vocab_size)[None]
    with torch.autocast(ids.device.type, dtype=first[0].dtype, enabled=first[0].dtype == torch.bfloat16):
        outputs = [run_layers(model, ids, stop=num_frozen) for model in (owner, other)]
    return torch.equal(*outputs)


def _embeddings(decoder: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every embedding of the decoder outside of its layers, as (path, module)."""
    in_layers = {id(module) for module in _layers_in(decoder)[1].modules()}
    return [
        (name.split("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and id(module) not in in_layers
    ]


def _layers_in(decoder: Any) -> tuple[list[str], nn.ModuleList]:
    """The path and the list of the decoder's layers: the list nearest to its root with one module per layer of the config."""
    total = num_layers(decoder)
    lists = [
        (name.split("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not lists:
        raise InputError(
            f"{type(decoder).__name__} does not keep its {total} layers in a list, so they cannot be frozen or adapted; "
            "set model.num_frozen_layers to 0 and model.lora to null."
        )
    return min(lists, key=lambda found: len(found[0]))


def _with_child(module: nn.Module, path: list[str], child: nn.Module) -> Any:
    """A shallow copy of module whose submodule at path is child; everything else is shared."""
    twin: Any = copy.copy(module)
    twin._modules = dict(module._modules)
    inner = module._modules[path[0]]
    assert inner is not None
    twin._modules[path[0]] = child if len(path) == 1 else _with_child(inner, path[1:], child)
    return twin


class _Standin(nn.Module):
    """Takes the place of a module, and answers with its attributes, such as the kind of attention of a layer."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class _Skip(_Standin):
    """A layer that is not run: returns its input, or known states instead."""

    def __init__(self, original: nn.Module, states: Tensor | None = None) -> None:
        super().__init__(original)
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = self.states
        if states is None:
            states = args[0] if args else kwargs["hidden_states"]
        # Layers of some architectures return a tuple that begins with the hidden states.
        length = _output_lengths.get(type(self.__dict__["original"]), 0)
        return (states, *[None] * (length - 1)) if length else states


class _Record(_Standin):
    """A layer whose output is recorded."""

    states: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = self.__dict__["original"]
        output = original(*args, **kwargs)
        is_tuple = isinstance(output, tuple | list)
        self.states = output[0] if is_tuple else output
        _output_lengths[type(original)] = len(output) if is_tuple else 0
        return output


# Length of the tuple that a class of layers returns, or 0 if it returns only the hidden states; known once one has run.
_output_lengths: dict[type, int] = {}


class Output:
    """A decoder's output; what is not known is None."""

    def __init__(self, **known: Any) -> None:
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, item: Any) -> Any:
        return (self.last_hidden_state,)[item]


class _ReturnOutput(_Standin):
    """A decoder that is not run: returns a known output."""

    def __init__(self, original: nn.Module, output: Output) -> None:
        super().__init__(original)
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
