"""Reward models as they are published: one label, a tokenizer and a chat template of their own, raw scores in the tens."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from tests.support.chat_tokenizers import make_tokenizer


def make_public_reward_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, *, scale: float = 60.0, offset: float = 0.0
) -> Path:
    """offset is a bias of the head, which transformers' own classes ignore."""
    tokenizer = tokenizer or make_tokenizer("gemma")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config)
    if offset:
        model.score = torch.nn.Linear(32, 1, bias=True)
        torch.nn.init.constant_(model.score.bias, offset)
    with torch.no_grad():
        model.score.weight.normal_(0, scale / 32**0.5, generator=torch.Generator().manual_seed(4))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
