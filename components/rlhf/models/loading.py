"""Loading of Hugging Face model folders (safetensors, offline)."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from components.rlhf.models.layers import HEAD_NAME, NOT_COMPUTED, decoder_of
from components.rlhf.models.nf4 import quantize_layers
from components.rlhf.models.placing import (
    Dtypes,
    Placement,
    Shard,
    frozen_dtypes,
    reference_dtypes,
    trained_dtypes,
)
from components.rlhf.text.errors import InputError

CPU = torch.device("cpu")
Quantization = Literal["nf4"] | None


class Fp32Head(nn.Linear):
    """The scalar head, computed in fp32 independent of the dtype of its weights."""

    def forward(self, features: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.linear(features.float(), self.weight.float(), bias)


def load_causal_lm(
    directory: Path,
    *,
    num_frozen_layers: int,
    dtype: torch.dtype,
    trainable: bool = True,
    trained_dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    shard: Shard | None = None,
    quantization: Quantization = None,
) -> Any:
    """Load a causal language model without dropout: trainable parts in trained_dtype, frozen ones (all if not trainable) in dtype.

    Each tensor is cast, moved to the device and sharded (see Shard) as soon as it is read; with a shard no process holds the whole model.
    quantization keeps the linear layers of a model that is not trainable in 4 bits, which it gets one by one in main memory.
    """
    dtypes = _dtypes(num_frozen_layers, dtype, trainable, trained_dtype)
    placement = Placement(dtypes=dtypes, device=device, shard=shard)
    return _load(AutoModelForCausalLM, directory, placement, trainable, quantize_to=dtype if quantization else None)


def load_reference_lm(
    directory: Path, *, num_frozen_layers: int, dtype: torch.dtype, device: torch.device = CPU
) -> Any:
    """Load a frozen copy of a model that the engine torch trains, in the least precision that gives bitwise the same log-probs."""
    if dtype == torch.float32:
        return load_causal_lm(directory, num_frozen_layers=0, dtype=dtype, trainable=False, device=device)
    dtypes = reference_dtypes(num_frozen_layers=num_frozen_layers, dtype=dtype)
    return _load(AutoModelForCausalLM, directory, Placement(dtypes=dtypes, device=device), trainable=False)


def load_scalar_lm(
    directory: Path,
    *,
    num_frozen_layers: int,
    dtype: torch.dtype,
    trainable: bool = True,
    seed: int | None = None,
    trained_dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    shard: Shard | None = None,
    quantization: Quantization = None,
) -> Any:
    """Load a model with a scalar head, as load_causal_lm. With a seed the head is drawn from a normal with std 1 / (hidden_size + 1).

    Without a seed the folder must contain a trained head. The scale of the initialization is that of OpenRLHF v0.5.5
    models/model.py `_get_reward_model`.
    """
    register_scalar_class(_config(directory))
    dtypes = _dtypes(num_frozen_layers, dtype, trainable, trained_dtype)
    placement = Placement(dtypes=dtypes, device=device, shard=shard)

    def give_head(model: Any) -> None:
        old = getattr(model, HEAD_NAME)
        # Some public reward models have a bias, for which transformers' own classes have no place.
        bias = None if seed is not None else _stored_tensor(directory, f"{HEAD_NAME}.bias")
        head = Fp32Head(old.in_features, 1, bias=bias is not None)
        head.weight = old.weight
        if bias is not None:
            head.bias = nn.Parameter(bias)
        if seed is not None:
            weight = torch.randn((1, old.in_features), generator=torch.Generator().manual_seed(seed))
            head.weight = nn.Parameter((weight / (old.in_features + 1)).to(model.config.dtype))
        setattr(model, HEAD_NAME, head)

    return _load(
        AutoModelForSequenceClassification,
        directory,
        placement,
        trainable,
        complete=give_head,
        quantize_to=dtype if quantization else None,
        needs_head=seed is None,
        num_labels=1,
    )


def register_scalar_class(config: Any) -> None:
    """Give transformers a sequence classification class for an architecture that has none with the head `score`.

    It is the architecture's causal language model with the head `score` in place of its own. Its folders have the layout of those
    of other architectures.
    """
    kind = type(config)
    known: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(kind, None)
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    if causal is not None and (known is None or not _has_linear_head(known, config)):
        AutoModelForSequenceClassification.register(kind, _scalar_class(causal, kind), exist_ok=True)


def require_scalar_class(config: Any) -> None:
    """Raise InputError if no reward model and no critic can be made of this architecture."""
    register_scalar_class(config)
    from_config: Any = AutoModelForSequenceClassification.from_config
    scalar_config = copy.deepcopy(config)
    scalar_config.num_labels = 1
    try:
        with torch.device("meta"):
            model = from_config(scalar_config, trust_remote_code=False)
            model._init_weights(model)  # as when a folder is loaded, but without data on the device meta
        if not isinstance(getattr(model, HEAD_NAME, None), nn.Linear):
            raise ValueError(f"{type(model).__name__} has no head named {HEAD_NAME}")
    except Exception as error:  # the code of an architecture can raise any exception in a class that it does not expect
        raise InputError(
            f"No reward model can be made of the architecture {config.model_type} ({error}); choose another one."
        ) from error


def _scalar_class(causal: Any, config: Any) -> Any:
    class Scalar(causal):  # type: ignore[misc]
        # transformers renames weights and initializes buffers as the architecture needs it only for classes of its own modules.
        __module__ = causal.__module__
        config_class = config
        _tied_weights_keys = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            head = super().get_output_embeddings()
            name = next(name for name, child in self.named_children() if any(m is head for m in child.modules()))
            delattr(self, name)
            setattr(self, HEAD_NAME, nn.Linear(head.weight.shape[1], config.num_labels, bias=False))
            self.num_labels = config.num_labels
            self.post_init()

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            """Logits [B, num_labels] of texts without padding, at their last token."""
            hidden = decoder_of(self)(input_ids=input_ids, use_cache=False, **options).last_hidden_state
            return SequenceClassifierOutput(logits=getattr(self, HEAD_NAME)(hidden[:, -1]))

    stem = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    Scalar.__name__ = Scalar.__qualname__ = f"{stem}ForSequenceClassification"
    return Scalar


def _has_linear_head(kind: Any, config: Any) -> bool:
    try:
        with torch.device("meta"):
            return isinstance(getattr(kind(config), HEAD_NAME, None), nn.Linear)
    except Exception:  # some classes cannot be made from the config of a causal language model
        return False


def load_reward_model(directory: Path) -> tuple[Any, dict[str, Any]]:
    """A sequence classification model as its class loads it, with transformers' loading info. Raises InputError."""
    register_scalar_class(_config(directory))
    return load_with_info(AutoModelForSequenceClassification, directory)


def reward_normalization(directory: Path) -> tuple[float, float]:
    """The mean and std that scores are normalized with, from a reward model folder. Raises InputError if they are missing."""
    config = _config(directory)
    mean, std = getattr(config, "reward_mean", None), getattr(config, "reward_std", None)
    if mean is None or std is None:
        raise InputError(
            f"{directory}/config.json lacks reward_mean and reward_std; add them (0 and 1 for raw scores)."
        )
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (mean, std)) or std <= 0:
        raise InputError(
            f"{directory}/config.json: reward_mean and reward_std must be finite numbers, and reward_std must be above 0."
        )
    return float(mean), float(std)


def is_scored_as_text(directory: Path) -> bool:
    """Whether a reward model has a tokenizer of its own, so that responses must reach it as text and not as ids."""
    return getattr(_config(directory), "scored_as", "ids") == "text"


def load_stop_ids(directory: Path) -> tuple[int, ...]:
    """All ids that end a response, from generation_config.json of a model folder, or else from config.json."""
    try:
        ids = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    except OSError:  # the file is missing
        ids = None
    except Exception as error:  # a broken file raises any type
        raise _not_a_model(directory, error) from error
    if ids is None:
        ids = getattr(_config(directory), "eos_token_id", None)
    if ids is None:
        raise InputError(
            f"{directory}: no eos_token_id in generation_config.json or config.json; add it, because a response could never stop."
        )
    ids = list(ids) if isinstance(ids, list | tuple) else [ids]
    if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise InputError(f"{directory}: eos_token_id must be a token id or a list of token ids.")
    return tuple(ids)


def empty_causal_lm(directory: Path) -> Any:
    """The model of a folder without its weights, on the device meta."""
    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return from_config(_config(directory), trust_remote_code=False)


def require_same_architecture(lm: Any, directory: Path) -> None:
    """Raise InputError unless a model of the folder computes with its weights what lm would."""
    kinds = type(lm.config), type(config := _config(directory))
    own, other = (
        {key: value for key, value in c.get_text_config().to_dict().items() if key not in NOT_COMPUTED}
        for c in (lm.config, config)
    )
    differing = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    if kinds[0] is not kinds[1] or differing:
        raise InputError(
            f"{directory}/config.json is of another architecture than the model that was loaded first "
            f"({', '.join(differing) or 'another class'} differs); pass a model that was trained from it."
        )


def load_with_info(
    kind: Any, directory: Path, placement: Placement | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model by an Auto class (kind), with transformers' loading info; in its stored dtype without a placement.

    Raises InputError, and errors of the placement as they are.
    """
    placing: contextlib.AbstractContextManager[list[Exception]] = contextlib.nullcontext([])
    if placement is not None:
        placing = placement.while_loading()
    with placing as failed:
        try:
            model, info = kind.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto",
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # broken or missing files raise any type
            if error in failed:
                raise
            raise _not_a_model(directory, error) from error
    return model, info


def _config(directory: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken or missing config.json raises any type
        raise _not_a_model(directory, error) from error


def _not_a_model(directory: Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
    return InputError(f"{directory} is not a model folder that transformers can load ({reason}).")


def _load(
    kind: Any,
    directory: Path,
    placement: Placement,
    trainable: bool,
    *,
    complete: Callable[[Any], None] = lambda model: None,
    needs_head: bool = True,
    quantize_to: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Load a model into its final place; complete(model) may add weights that its class has no place for.

    quantize_to is the precision that a model computes in whose linear layers are kept in 4 bits.
    """
    # Whole weights stay in main memory: a GPU may have room only for their 4 bits.
    loading = placement if quantize_to is None else replace(placement, device=CPU)
    model, info = load_with_info(kind, directory, loading, **options)
    missing = {name for name in info["missing_keys"] if needs_head or not name.startswith(f"{HEAD_NAME}.")}
    if missing:
        raise InputError(
            f"{directory} lacks the weights {', '.join(sorted(missing)[:3])}; the model folder is incomplete."
        )
    if ignored := _ignored_weights(model, info["unexpected_keys"]):
        raise InputError(
            f"{directory} has the weights {', '.join(ignored[:3])}, which {type(model).__name__} does not use with this "
            "config.json, so it would not be the model that was trained; correct config.json."
        )
    complete(model)
    if quantize_to is not None:
        quantize_layers(model, directory, dtype=quantize_to)
    if not trainable:
        model.requires_grad_(False)
    placement.settle(model)
    # Always in eval mode: with dropout, log-probs of the same tokens would differ between rollout and update.
    return model.eval()


def _ignored_weights(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Weights of the folder that belong to a module of the model, such as a bias, but are not loaded.

    Weights of whole modules that the class leaves out, such as another head or a vision tower, do not change what it computes.
    """
    with_weights = {
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    head_bias = f"{HEAD_NAME}.bias"  # loaded by load_scalar_lm
    return sorted(name for name in unexpected if name.rpartition(".")[0] in with_weights and name != head_bias)


def _stored_tensor(directory: Path, name: str) -> Tensor | None:
    """A weight of the folder, or None if it has none of this name."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return cast(Tensor, file.get_tensor(name))
    return None


def _dtypes(num_frozen_layers: int, dtype: torch.dtype, trainable: bool, trained_dtype: torch.dtype) -> Dtypes:
    if not trainable:
        return frozen_dtypes(dtype)
    return trained_dtypes(num_frozen_layers=num_frozen_layers, frozen=dtype, trained=trained_dtype)


def cast_parameters(module: Any, dtype: torch.dtype) -> Any:
    """Cast the parameters in place, but no buffer: in bf16, RoPE's frequencies would be wrong by 1 radian after 1,000 tokens."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return module


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
