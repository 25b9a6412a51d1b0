"""Lengths of chat-like data: `python -m benchmarks.peers.chat_lengths` writes chat_lengths.json.

The lengths are drawn once from two lognormal distributions, with a seed, and committed. They have the long tail of chat data:
a mean of about 564 tokens per row, prompt and response together, and at most 2048.
"""

import json
import random
from pathlib import Path

PATH = Path(__file__).with_name("chat_lengths.json")
ROWS, MAX_TOKENS, SEED = 256, 2048, 5
# Median and sigma of the lognormal distributions, and the longest prompt.
PROMPT, RESPONSE, MAX_PROMPT = (89.0, 1.0), (302.0, 0.75), 1024


def draw() -> list[list[int]]:
    """ROWS pairs [prompt tokens, response tokens]."""
    generator = random.Random(SEED)
    rows = []
    for _ in range(ROWS):
        prompt, response = (round(median * generator.lognormvariate(0, sigma)) for median, sigma in (PROMPT, RESPONSE))
        prompt = min(max(prompt, 8), MAX_PROMPT)
        rows.append([prompt, min(max(response, 8), MAX_TOKENS - prompt)])
    return rows


def load(num_rows: int) -> list[list[int]]:
    """num_rows of the committed rows, evenly spaced in the order of their total length, so that their mean stays close."""
    rows = sorted(json.loads(PATH.read_text(encoding="utf-8")), key=sum)
    step = len(rows) // num_rows
    return rows[step // 2 :: step][:num_rows]


def random_ids(lengths: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """A prompt and a response of each length; time does not depend on the ids, so they are random ordinary tokens."""
    generator = random.Random(SEED)
    return [
        (
            [generator.randrange(1000, 40000) for _ in range(prompt)],
            [generator.randrange(1000, 40000) for _ in range(response)],
        )
        for prompt, response in lengths
    ]


if __name__ == "__main__":
    PATH.write_text("[\n" + ",\n".join(json.dumps(row) for row in draw()) + "\n]\n", encoding="utf-8")
