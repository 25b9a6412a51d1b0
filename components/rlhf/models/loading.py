"""Loading and saving of Hugging Face model folders (safetensors, offline)."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerBase,
    modeling_utils,
)

from components.rlhf.models.layers import HEAD_NAME, frozen_modules, require_layers_to_train
from components.rlhf.models.lora import lora_scale, merged_weights, save_adapter
from components.rlhf.text.errors import InputError


class Fp32Head(nn.Linear):
    """The scalar head, computed in fp32 independent of the dtype of its weight."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.linear(features.float(), self.weight.float())


def load_causal_lm(directory: Path, *, num_frozen_layers: int, dtype: torch.dtype, trainable: bool = True) -> Any:
    """Load a causal language model without dropout: trainable parts in fp32, frozen parts (all if not trainable) in dtype."""
    model = _load(AutoModelForCausalLM, directory)
    return _set_precision(model, num_frozen_layers=num_frozen_layers, dtype=dtype, trainable=trainable)


def load_scalar_lm(
    directory: Path, *, num_frozen_layers: int, dtype: torch.dtype, trainable: bool = True, seed: int | None = None
) -> Any:
    """Load a model with a scalar head. With a seed the head is initialized from a normal with std 1 / (hidden_size + 1).

    Without a seed the folder must contain a trained head. The scale of the initialization is that of OpenRLHF v0.5.5
    models/model.py `_get_reward_model`.
    """
    model = _load(AutoModelForSequenceClassification, directory, needs_head=seed is None, num_labels=1)
    head = Fp32Head(model.config.hidden_size, 1, bias=False)
    head.weight = getattr(model, HEAD_NAME).weight
    setattr(model, HEAD_NAME, head)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1))
    return _set_precision(model, num_frozen_layers=num_frozen_layers, dtype=dtype, trainable=trainable)


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


def collect_weights(named: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Copy the weights that an engine streams to main memory, under the language model's own names.

    Every rank must iterate over all of them, because gathering is collective; ranks with keep False return {}.
    """
    collected: dict[str, Tensor] = {}
    for name, weight in named:
        if keep:
            collected[name.removeprefix("lm.")] = weight.to("cpu", copy=True)
    return collected


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors, in dtype), config, generation config and tokenizer for from_pretrained.

    weights replace the model's own, which may be sharded. Adapters are merged into the weights, and also written to
    adapter/ for peft to load onto the base model.
    Raises InputError when a weight is nan or infinite, which the loss cannot show after the last step.
    """
    if weights is None:
        weights = model.state_dict()
    nonfinite = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if nonfinite:
        raise InputError(
            f"The weights {', '.join(nonfinite[:3])} are not finite after the last step; lower the learning rate."
        )
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in merged_weights(model, weights.items())}
    model.config.dtype = dtype
    with _without_deepspeed_import():
        model.save_pretrained(directory, state_dict=state, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    if lora_scale(model):
        save_adapter(model, weights, directory / "adapter")
    for file in directory.rglob("*.safetensors"):  # written with mode 0600, but other pods may run as another user
        file.chmod(0o644)


@contextlib.contextmanager
def _without_deepspeed_import() -> Iterator[None]:
    """Skip save_pretrained's unwrapping of the model, which imports DeepSpeed for seconds; models here are never wrapped."""
    original = modeling_utils.unwrap_model
    modeling_utils.unwrap_model = lambda model: model  # type: ignore[assignment]
    try:
        yield
    finally:
        modeling_utils.unwrap_model = original


def load_with_info(kind: Any, directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model by an Auto class (kind) in its stored dtype, with transformers' loading info. Raises InputError."""
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


def _load(kind: Any, directory: Path, *, needs_head: bool = True, **options: Any) -> Any:
    model, info = load_with_info(kind, directory, **options)
    missing = {name for name in info["missing_keys"] if needs_head or not name.startswith(f"{HEAD_NAME}.")}
    if missing:
        raise InputError(
            f"{directory} lacks the weights {', '.join(sorted(missing)[:3])}; the model folder is incomplete."
        )
    return model


def _set_precision(model: Any, *, num_frozen_layers: int, dtype: torch.dtype, trainable: bool) -> Any:
    # Always in eval mode: with dropout, log-probs of the same tokens would differ between rollout and update.
    model.eval()
    if not trainable:
        model.requires_grad_(False)
        return model.to(dtype)
    require_layers_to_train(model, num_frozen_layers)
    model.float()
    for module in frozen_modules(model, num_frozen_layers) if num_frozen_layers else []:
        module.to(dtype)
    return model


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
