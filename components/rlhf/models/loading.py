"""Models on disk: ordinary Hugging Face folders in safetensors, loaded offline."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import accelerate.utils.other
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from components.rlhf.models.layers import HEAD_NAME, frozen_modules, require_layers_to_train
from components.rlhf.models.lora import lora_scale, merged_weights, save_adapter
from components.rlhf.text.errors import InputError


class Fp32Head(nn.Linear):
    """The scalar head. It is small, and computes in fp32 whatever its weight is in."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.linear(features.float(), self.weight.float())


def load_causal_lm(directory: Path, *, num_frozen_layers: int, dtype: torch.dtype, trainable: bool = True) -> Any:
    """A causal language model with dropout off: frozen parts in dtype, what can be trained in fp32 (in dtype if nothing is)."""
    model = _load(AutoModelForCausalLM, directory)
    return _set_precision(model, num_frozen_layers=num_frozen_layers, dtype=dtype, trainable=trainable)


def load_scalar_lm(
    directory: Path, *, num_frozen_layers: int, dtype: torch.dtype, trainable: bool = True, seed: int | None = None
) -> Any:
    """A model with a scalar head. With a seed the head is drawn afresh: normal with std 1 / (hidden + 1).

    Without a seed the folder must have one: a random head would score at random and say nothing. The fresh head's scale is
    that of OpenRLHF v0.5.5 models/model.py `_get_reward_model`.
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
    """The mean and std of a reward model's folder. Raises InputError when it has none: identity would be a silent guess."""
    config = _config(directory)
    mean, std = getattr(config, "reward_mean", None), getattr(config, "reward_std", None)
    if mean is None or std is None:
        raise InputError(
            f"{directory}/config.json lacks reward_mean and reward_std; add them (0 and 1 for raw scores)."
        )
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (mean, std)) or std <= 0:
        raise InputError(
            f"{directory}/config.json: reward_mean and reward_std must be finite numbers, the second above 0."
        )
    return float(mean), float(std)


def load_stop_ids(directory: Path) -> tuple[int, ...]:
    """Every id that ends a response, from the generation settings of a model folder, or else from its config."""
    try:
        ids = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    except OSError:  # there is none
        ids = None
    except Exception as error:  # whatever a broken one makes the library raise
        raise _not_a_model(directory, error) from error
    if ids is None:
        ids = getattr(_config(directory), "eos_token_id", None)
    if ids is None:
        raise InputError(
            f"{directory}: no eos_token_id in generation_config.json or config.json; a response could never end."
        )
    ids = list(ids) if isinstance(ids, list | tuple) else [ids]
    if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise InputError(f"{directory}: eos_token_id must be an id of the tokenizer, or a list of them.")
    return tuple(ids)


def collect_weights(named: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Weights of an Actor or ScalarModel, as an engine gives them one by one, in main memory under the language model's own names.

    Every process goes through all of them, because they may have to be gathered; those that do not keep them return {}.
    """
    found: dict[str, Tensor] = {}
    for name, weight in named:
        if keep:
            found[name.removeprefix("lm.")] = weight.to("cpu", copy=True)
    return found


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors, in dtype), config, generation settings and tokenizer as from_pretrained reads them.

    weights are taken in place of the model's own, which may be sharded. Adapters are merged into the weights, and lie by
    themselves in adapter/ as peft reads them onto the model they started from.
    Raises InputError when a weight is nan or infinite: no loss sees what the last step of training did.
    """
    if weights is None:
        weights = model.state_dict()
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"The weights {', '.join(broken[:3])} are not finite after the last step; lower the learning rate."
        )
    state = {name: tensor.detach().to(dtype).contiguous() for name, tensor in merged_weights(model, weights.items())}
    model.config.dtype = dtype
    with _without_deepspeed_import():
        model.save_pretrained(directory, state_dict=state, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    if lora_scale(model):
        save_adapter(model, weights, directory / "adapter")
    for file in directory.rglob("*.safetensors"):  # they come out readable by their owner alone; pods differ in user
        file.chmod(0o644)


@contextlib.contextmanager
def _without_deepspeed_import() -> Iterator[None]:
    """save_pretrained imports DeepSpeed, for seconds, to see whether it wraps the model; here it wraps none that is saved."""
    original = accelerate.utils.other.is_deepspeed_available
    accelerate.utils.other.is_deepspeed_available = lambda: False
    try:
        yield
    finally:
        accelerate.utils.other.is_deepspeed_available = original


def load_with_info(kind: Any, directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' Auto classes in its stored precision, and its report of missing weights. Raises InputError."""
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
    except Exception as error:  # whatever broken or missing files make the libraries raise
        raise _not_a_model(directory, error) from error
    return model, info


def _config(directory: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken or missing config.json makes the library raise
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
    # Dropout would make log-probs of the same tokens differ between rollout and update: eval mode, always.
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
