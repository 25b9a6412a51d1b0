"""Looking at a model folder that somebody else made, before any library builds what it describes.

Weights are safetensors alone: every other format is a pickle or may hold one, and loading a pickle can run any code. Code that
comes with a model (auto_map) is never run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.npy", "*.npz", "*.joblib")
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 * 2**20
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
MAX_PARAMETERS_PER_BYTE = 8  # parameters a stored byte: far more than any quantisation packs


def require_safe_model_folder(folder: Path) -> None:
    """Raise InputError for a folder whose weights are pickles, that needs code of its own, whose files name others outside,
    or whose config describes a model far larger than its weights."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX):
        _json(folder / name)
    if not (folder / "config.json").is_file():
        return  # the loaders say it
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter, which names its base model itself; merge it and name the merged model."
        )
    shards = _shards(folder)
    config = _json(folder / "config.json")
    _require_known_code(folder, config)
    if shards:
        _require_plausible(folder, config, shards)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    if not path.is_file():
        if path.exists():
            raise InputError(f"{path} is no ordinary file; save the model again.")
        return {}
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        content = parse_json(text) if len(text) <= MAX_JSON_BYTES else None
        if not isinstance(content, dict):
            raise NotJsonError(f"no object of at most {MAX_JSON_BYTES // 2**20} MiB")
        return content
    except (OSError, NotJsonError) as error:
        raise InputError(
            f"{path.parent} is not a model folder that transformers can load ({path.name} is not JSON: {error})."
        ) from None


def _shards(folder: Path) -> list[Path]:
    """The files of weights, which lie in the folder and are safetensors. None: the loaders say it."""
    index = _json(folder / INDEX).get("weight_map", {})
    names = index.values() if isinstance(index, Mapping) else [index]
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise InputError(f"{folder}/{INDEX} names {name!a:.200}, which is no safetensors file of this folder.")
    shards = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled and not shards:
        raise InputError(
            f"{folder} has its weights in {pickled[0]}, a format that can run code when it is loaded, and is not read; "
            "save the model as safetensors."
        )
    if not all(path.is_file() for path in shards):
        raise InputError(f"{folder} holds weights that are no ordinary files; save the model again.")
    return shards


def _require_known_code(folder: Path, config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if "auto_map" in config and model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{folder} needs code that comes with the model (auto_map in config.json), which is never run here; "
            "choose a model whose architecture transformers has."
        )
    tokenizer = _json(folder / "tokenizer_config.json")
    if "auto_map" in tokenizer and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} needs code that comes with its tokenizer (auto_map in tokenizer_config.json), which is never run here; "
            "save the tokenizer as tokenizer.json."
        )


def _require_plausible(folder: Path, config: Mapping[str, Any], shards: list[Path]) -> None:
    """A config of ten lines can ask for any amount of memory; the weights say how much of it is meant."""
    try:
        num_tensors = 0
        for path in shards:
            with safe_open(path, framework="pt") as file:
                num_tensors += len(file.keys())
        sizes = [config, *(part for part in config.values() if isinstance(part, dict))]
        for part in sizes:
            layers = [part[name] for name in LAYERS if part.get(name) is not None]
            if any(type(n) is not int or not 0 <= n <= num_tensors for n in layers):
                raise ValueError("config.json describes more layers than there are weights")
            if part.get("num_labels") is not None and not 0 <= int(part["num_labels"]) <= 10_000:
                raise ValueError("config.json: num_labels is no number of labels")
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
                trust_remote_code=False,
            )
        if (
            sum(p.numel() for p in built.parameters())
            > MAX_PARAMETERS_PER_BYTE * sum(path.stat().st_size for path in shards) + 2**20
        ):
            raise ValueError("config.json describes a model far larger than its weights")
    except Exception as error:  # whatever a broken config.json or broken weights make the libraries raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise InputError(f"{folder} is not a model folder that transformers can load ({reason}).") from error
