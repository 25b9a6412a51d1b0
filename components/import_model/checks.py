"""Checks of an untrusted model folder before any library loads it.

Only safetensors weights are accepted: other formats are or may contain pickles, which can run any code when loaded. Code that
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
MAX_PARAMETERS_PER_BYTE = 8  # far more than any quantization stores


def require_safe_model_folder(folder: Path) -> None:
    """Raise InputError if a model folder has pickled weights, needs its own code, refers to files outside of it, or has a
    config that describes a model far larger than its weights."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX):
        _read_json(folder / name)
    if not (folder / "config.json").is_file():
        return  # reported when the model is loaded
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} contains an adapter without its base model; merge the adapter, and use the merged model."
        )
    shards = _list_shards(folder)
    config = _read_json(folder / "config.json")
    _require_known_code(folder, config)
    if shards:
        _require_plausible_size(folder, config, shards)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} if the file does not exist."""
    if not path.is_file():
        if path.exists():
            raise InputError(f"{path} is not a regular file; save the model again.")
        return {}
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        content = parse_json(text) if len(text) <= MAX_JSON_BYTES else None
        if not isinstance(content, dict):
            raise NotJsonError(f"expected an object of at most {MAX_JSON_BYTES // 2**20} MiB")
        return content
    except (OSError, NotJsonError) as error:
        raise InputError(
            f"{path.parent} is not a model folder that transformers can load ({path.name} is not JSON: {error})."
        ) from None


def _list_shards(folder: Path) -> list[Path]:
    """The safetensors files of the folder. An empty list is reported when the model is loaded."""
    index = _read_json(folder / INDEX).get("weight_map", {})
    names = index.values() if isinstance(index, Mapping) else [index]
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise InputError(
                f"{folder}/{INDEX} lists {name!a:.200}, which is not a safetensors file in this folder; save the model again."
            )
    shards = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled and not shards:
        raise InputError(
            f"{folder} has its weights in {pickled[0]}, a format that can run code when it is loaded; "
            "save the model as safetensors."
        )
    if not all(path.is_file() for path in shards):
        raise InputError(f"{folder} contains weights that are not regular files; save the model again.")
    return shards


def _require_known_code(folder: Path, config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if "auto_map" in config and model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{folder} needs code that comes with the model (auto_map in config.json), which is never run; "
            "choose a model with an architecture of transformers."
        )
    tokenizer = _read_json(folder / "tokenizer_config.json")
    if "auto_map" in tokenizer and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} needs code that comes with its tokenizer (auto_map in tokenizer_config.json), which is never run; "
            "save the tokenizer as tokenizer.json."
        )


def _require_plausible_size(folder: Path, config: Mapping[str, Any], shards: list[Path]) -> None:
    """Compare the model that config.json describes, which can be arbitrarily large, with the size of the weights."""
    try:
        num_tensors = 0
        for path in shards:
            with safe_open(path, framework="pt") as file:
                num_tensors += len(file.keys())
        for part in (config, *(part for part in config.values() if isinstance(part, dict))):
            layers = [part[name] for name in LAYERS if part.get(name) is not None]
            if any(type(n) is not int or not 0 <= n <= num_tensors for n in layers):
                raise ValueError("config.json describes more layers than there are weights")
            if part.get("num_labels") is not None and not 0 <= int(part["num_labels"]) <= 10_000:
                raise ValueError("config.json: num_labels is not between 0 and 10,000")
        model_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        num_bytes = sum(path.stat().st_size for path in shards)
        if sum(p.numel() for p in model.parameters()) > MAX_PARAMETERS_PER_BYTE * num_bytes + 2**20:
            raise ValueError("config.json describes a model far larger than its weights")
    except Exception as error:  # a corrupt config.json or corrupt weights can raise any type
        reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise InputError(f"{folder} is not a model folder that transformers can load ({reason}).") from error
