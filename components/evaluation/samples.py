"""Selects responses for the report, and writes all of them to the artifact."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.evaluation.compare import Comparison, ScoredResponses

NUM_EXTREMES, NUM_RANDOM = 5, 10


def choose_rows(gains: Sequence[float], *, seed: int) -> dict[str, list[int]]:
    """Indices of the prompts to show, by group: the largest gains, the largest losses, and a seeded sample of the rest."""
    order = sorted(range(len(gains)), key=lambda i: gains[i], reverse=True)
    middle = order[NUM_EXTREMES:-NUM_EXTREMES]
    return {
        "Largest gains": order[:NUM_EXTREMES],
        "Largest losses": order[-NUM_EXTREMES:][::-1],
        "At random": random.Random(seed).sample(middle, min(NUM_RANDOM, len(middle))),
    }


def save_comparison(
    comparison: Comparison, numbers: Mapping[str, float], training: Sequence[Mapping[str, float]], folder: Path
) -> None:
    """Write samples.jsonl (a line per prompt), training.jsonl (a line per validation pass), and evaluation.json (all numbers)."""
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in training), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(comparison.prompts):
            row = {
                "id": prompt.id,
                "prompt": prompt.prompt,
                "sft": _response_row(comparison.sft, number),
                "ppo": _response_row(comparison.ppo, number) | {"kl": comparison.kl[number]},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _response_row(scored: ScoredResponses, number: int) -> dict[str, str | float | bool]:
    completion = scored.completions[number]
    return {
        "response": completion.response,
        "num_tokens": len(completion.response_ids),
        "truncated": completion.truncated,
        "judge_score": scored.judge_scores[number],
        "reward": scored.rewards[number],
    }
