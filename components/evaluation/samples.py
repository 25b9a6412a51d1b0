"""Every answer of both models, one line a prompt, for whoever wants to judge again."""

import json
from collections.abc import Mapping
from pathlib import Path

from components.evaluation.compare import Comparison, Side


def save_comparison(comparison: Comparison, numbers: Mapping[str, float], folder: Path) -> None:
    """samples.jsonl, and evaluation.json with every number of the verdict."""
    (folder / "evaluation.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(comparison.prompts):
            row = {
                "id": prompt.id,
                "prompt": prompt.prompt,
                "sft": _answer(comparison.sft, number),
                "ppo": _answer(comparison.ppo, number) | {"kl": comparison.kl[number]},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _answer(side: Side, number: int) -> dict[str, str | float | bool]:
    completion = side.completions[number]
    return {
        "response": completion.response,
        "num_tokens": len(completion.response_ids),
        "truncated": completion.truncated,
        "judge_score": side.judge_scores[number],
        "reward": side.rewards[number],
    }
