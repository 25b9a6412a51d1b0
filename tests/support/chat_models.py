"""Tiny random chat models of the families that the params files name, with tokenizers and generation configs in their style."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from components.rlhf.config.prepare_data import DataSource

HIDDEN_SIZE = 128  # ZeRO-3 keeps weights of up to 10,000 elements whole, and vLLM's CPU kernels need heads of 32
SIZES: dict[str, Any] = dict(
    hidden_size=HIDDEN_SIZE,
    intermediate_size=2 * HIDDEN_SIZE,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
)
ADJECTIVES = ("good", "fun", "great", "bad", "dull", "awful")
SUBJECTS = ("film", "plot", "cast", "song", "end", "set", "joke", "tale")
WORDS = f"What do you think of the ? The is . Answer in one sentence, please. {' '.join(ADJECTIVES + SUBJECTS)}"

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes the chat models of one family, apart from their sizes."""

    config: Callable[..., PretrainedConfig]
    special_tokens: tuple[str, ...]
    template: str
    eos: str  # of the tokenizer
    stops: tuple[str, ...]  # of generation_config.json, which names several
    bos: str | None = None  # which the tokenizer itself adds in front of a text
    pad: str | None = None
    generation: dict[str, Any]  # sampling defaults of the model, which training must not use


FAMILIES = {  # by a part of the model id
    "llama-3": Family(
        config=lambda **sizes: LlamaConfig(
            **sizes,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        special_tokens=(
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
        ),
        template=LLAMA3_TEMPLATE,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "qwen2.5": Family(
        config=lambda **sizes: Qwen2Config(
            **sizes, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}
        ),
        special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template=QWEN_TEMPLATE,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        generation={"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    ),
}  # fmt: skip


def family_of(model_id: str) -> Family:
    """The family of a model id. A new family of a params file needs an entry in FAMILIES."""
    found = [family for name, family in FAMILIES.items() if name in model_id.lower()]
    assert len(found) == 1, f"FAMILIES in {__file__} has no entry for {model_id}"
    return found[0]


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the merges of a few words, and the family's special tokens and template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator([WORDS] * 2, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in family.special_tokens])
    if family.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad
    )
    tokenizer.chat_template = family.template
    return tokenizer


def make_chat_model(model_id: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a random model of the family of model_id, in bf16 as published models are, with more ids than tokens."""
    family = family_of(model_id)
    tokenizer = make_tokenizer(family)
    stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in family.stops]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
    config = family.config(vocab_size=-(-len(tokenizer) // 64) * 64, **SIZES, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(**ids, **family.generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_chat_data(folder: Path, sources: dict[str, DataSource], *, num_prompts: int = 60) -> dict[str, Path]:
    """Write the JSONL files of the sources, with the columns that each source names; demonstrations also as messages."""
    generator = random.Random(0)
    questions = [f"What do you think of the {SUBJECTS[n % len(SUBJECTS)]} {n}?" for n in range(num_prompts)]

    def answer(words: tuple[str, ...]) -> str:
        return f"The {generator.choice(SUBJECTS)} is {generator.choice(words)}."

    def messages(number: int, question: str) -> dict[str, Any]:
        system = [{"role": "system", "content": "Answer in one sentence, please."}] if number % 4 == 0 else []
        earlier = (
            [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hi."}] if number % 4 == 2 else []
        )
        return {"messages": [*system, *earlier, {"role": "user", "content": question}]}

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("demonstrations", "preferences", "prompts")}
    for number, question in enumerate(questions):
        conversation, reply = messages(number, question), answer(ADJECTIVES)
        rows["demonstrations"].append(
            {"messages": [*conversation["messages"], {"role": "assistant", "content": reply}]}
            if number % 2 == 0
            else {"prompt": question, "completion": reply}
        )
        rows["preferences"].append(
            {"prompt": question, "chosen": answer(ADJECTIVES[:3]), "rejected": answer(ADJECTIVES[3:])}
        )
        rows["prompts"].append(conversation if number % 2 == 0 else {"prompt": question})
    files = {}
    for name, source in sources.items():
        renamed = [{source.columns.get(key, key): value for key, value in row.items()} for row in rows[name]]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in renamed), encoding="utf-8")
    return files
