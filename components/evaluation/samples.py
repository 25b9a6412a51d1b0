"""Selects responses for the report, and writes all of them to the artifact."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluation.compare import Comparison, Responses
from components.evaluation.judging import Judged
from components.rlhf.data.records import Completion

NUM_EXTREMES, NUM_RANDOM = 5, 10
MAX_POINTS = 1000  # of a chart with a point per response


def choose_rows(gains: Sequence[float], *, seed: int) -> dict[str, list[int]]:
    """Indices of the prompts to show, each in one group: the largest gains, the largest losses, and a seeded sample of the rest."""
    order = sorted(range(len(gains)), key=lambda i: gains[i], reverse=True)
    middle = order[NUM_EXTREMES:-NUM_EXTREMES]
    return {
        "Largest gains": order[:NUM_EXTREMES],
        "Largest losses": order[NUM_EXTREMES:][-NUM_EXTREMES:][::-1],
        "At random": random.Random(seed).sample(middle, min(NUM_RANDOM, len(middle))),
    }


def choose_disagreements(judges: Sequence[Judged], *, seed: int) -> list[int]:
    """Rows on which one judge that can tell prefers the policy's response and another one SFT's: a seeded sample of them."""
    rows = disagreements(judges)
    return sorted(random.Random(seed).sample(rows, min(NUM_RANDOM, len(rows))))


def disagreements(judges: Sequence[Judged]) -> list[int]:
    """All rows on which one judge that can tell prefers the policy's response and another one SFT's."""
    wins = np.array([judge.wins for judge in judges if not judge.cannot_tell])
    if len(wins) < 2:
        return []
    rows: list[int] = np.flatnonzero((wins > 0.5).any(axis=0) & (wins < 0.5).any(axis=0)).tolist()
    return rows


def gains_of(judge: Judged) -> list[float]:
    """Gain in judge score of each row, or the win (1, 0 or -1) of a judge that gives no scores; 0 without an answer."""
    if judge.policy_scores is not None and judge.sft_scores is not None:
        return [p - s for p, s in zip(judge.policy_scores, judge.sft_scores, strict=True)]
    return [0.0 if np.isnan(win) else 2 * win - 1 for win in judge.wins.tolist()]


def save_comparison(
    comparison: Comparison,
    judges: Sequence[Judged],
    numbers: Mapping[str, float],
    training: Sequence[Mapping[str, float]],
    folder: Path,
) -> None:
    """Write samples.jsonl (a line per row), training.jsonl (a line per validation pass), and evaluation.json (all numbers)."""
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in training), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(comparison.prompts):
            row = {
                "id": prompt.id,
                "prompt": prompt.prompt,
                "sft": _response_row(comparison.sft, number) | _scores(judges, "sft_scores", number),
                comparison.method: _response_row(comparison.policy, number)
                | _scores(judges, "policy_scores", number)
                | {"kl": comparison.kl[number], "kl_exact": comparison.exact_kl[number]},
                "wins": {j.name: None if np.isnan(j.wins[number]) else float(j.wins[number]) for j in judges},
                "consistent": {j.name: j.consistent[number] for j in judges if j.is_pairwise},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _scores(judges: Sequence[Judged], side: str, number: int) -> dict[str, float]:
    """judge_score of the first judge, and judge_score_NAME of the others, if they give scores."""
    scores = [("judge_score" if i == 0 else f"judge_score_{j.name}", getattr(j, side)) for i, j in enumerate(judges)]
    return {name: values[number] for name, values in scores if values is not None}


def turns_of(completion: Completion) -> list[dict[str, str]]:
    """Who says what, turn by turn; empty for a response of a single turn."""
    return [{"speaker": turn.speaker, "text": turn.text} for turn in completion.turns]


def _response_row(responses: Responses, number: int) -> dict[str, Any]:
    completion = responses.completions[number]
    return {
        "response": completion.response,
        "num_tokens": completion.num_model_tokens,
        "truncated": completion.truncated,
        **({"turns": turns_of(completion)} if completion.turns else {}),
        **({} if responses.rewards is None else {"reward": responses.rewards[number]}),
    }
