"""The shape of a model on the Hugging Face hub: its config.json, and the headers of its files by ranged requests."""

import logging
from pathlib import Path

import huggingface_hub

from components.rlhf.planner.headers import BYTES, Tensor
from components.rlhf.planner.shape import ModelShape
from components.rlhf.planner.sources import MAX_JSON_BYTES, parse_config, shape_from
from components.rlhf.text.errors import InputError


def shape_on_hub(source: str, revision: str | None) -> ModelShape:
    """Raises InputError if the hub has no such model, or cannot be reached."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        huggingface_hub.model_info(
            source, revision=revision, timeout=10
        )  # unlike the next calls, it fails at once without a network
        path = Path(huggingface_hub.hf_hub_download(source, "config.json", revision=revision))
        config = parse_config(path.read_bytes()[: MAX_JSON_BYTES + 1], f"{source}/config.json")
        metadata = huggingface_hub.get_safetensors_metadata(source, revision=revision)
    except InputError:
        raise
    except Exception as error:  # many types, for a wrong id, a missing token and network errors
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(
            f"{source} is neither a local folder nor a model whose size could be read from the hub ({reason}); "
            "pass its config.json with --shape."
        ) from None
    tensors = {
        name: Tensor(shape=tuple(info.shape), num_bytes=info.parameter_count * BYTES.get(info.dtype, 0))
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return shape_from(config, tensors, source)
