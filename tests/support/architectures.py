"""Model folders of other architectures with the byte-level tiny tokenizer, for runs of whole stages."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tests.support.tiny_model import make_tiny_tokenizer
from tests.support.tiny_models import tiny_model

MIXTURES_OF_EXPERTS = ("mixtral", "qwen3_moe", "granitemoe")


def make_folder(kind: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """A random model of an architecture (transformers' model_type) whose vocabulary is that of the tokenizer."""
    tokenizer = tokenizer or make_tiny_tokenizer()
    model: Any = tiny_model(kind)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = model.config.get_text_config()
    text.bos_token_id, text.eos_token_id, text.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
