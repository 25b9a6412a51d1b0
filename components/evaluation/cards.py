"""Pairs of responses as the report lists them, with what the judges say about each."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.evaluation.compare import Comparison
from components.evaluation.judging import Judged
from components.evaluation.samples import (
    NUM_RANDOM,
    choose_disagreements,
    choose_rows,
    disagreements,
    gains_of,
    turns_of,
)
from components.rlhf.config.policy import TITLES
from components.rlhf.data.records import Completion

RANDOM, REST = "At random", "All others"
DISAGREEMENTS = "Where judges disagree"
MAX_LISTED, MAX_LISTED_CHARS = 500, 1_000_000  # pairs of responses in a report, and their characters


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response to the prompt of a card."""

    name: str  # of the model
    tone: str  # its color
    text: str
    turns: list[dict[str, str]] = field(default_factory=list)  # who says what; empty for a response of a single turn
    facts: str = ""  # scores, length and end, in words


@dataclass(frozen=True, kw_only=True)
class Card:
    """A prompt and the responses to it."""

    row: int
    prompt: str
    answers: list[Answer]
    gain: float | None  # of the first judge's score, or its win (1, 0 or -1); None if it cannot tell
    outcome: str  # win, loss or tie of the policy by the first judge, or "" without an answer
    verdicts: list[tuple[str, str]]  # name of a judge and what it prefers, of several judges
    disagree: bool
    length: int  # of the policy's response in tokens
    kl: float  # of the policy's response, in nats


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The listed pairs by group. A pair is in one group, except for those on which judges disagree."""

    groups: Mapping[str, list[Card]]
    num_rows: int  # of the comparison
    num_listed: int


def list_cards(
    comparison: Comparison,
    judges: Sequence[Judged],
    *,
    seed: int,
    rival: tuple[str, Sequence[str]] | None = None,
) -> Listing:
    """Selected pairs first: the largest gains and losses by the first judge and random ones, and then as many others as there is room for.

    Only random ones are selected if the first judge cannot tell. rival are the name and the responses of another policy.
    """
    gains = gains_of(judges[0])
    groups = choose_rows(gains, seed=seed)
    if judges[0].cannot_tell:
        groups = {RANDOM: groups[RANDOM] or list(range(len(gains)))[:NUM_RANDOM]}
    split = set(disagreements(judges))
    cards = {
        row: _card(comparison, judges, row, gains[row], disagree=row in split, rival=rival) for row in range(len(gains))
    }
    chosen = {row for rows in groups.values() for row in rows}
    room = MAX_LISTED_CHARS - sum(_size(cards[row]) for row in chosen)
    others = [row for row in cards if row not in chosen]
    kept = []
    for row in random.Random(seed).sample(others, len(others))[: max(MAX_LISTED - len(chosen), 0)]:
        room -= _size(cards[row])
        if room < 0:
            break
        kept.append(row)
    groups = {**groups, REST: sorted(kept)}
    listed = {group: [cards[row] for row in rows] for group, rows in groups.items() if rows}
    if shown := choose_disagreements(judges, seed=seed):
        listed = {DISAGREEMENTS: [cards[row] for row in shown], **listed}
    return Listing(groups=listed, num_rows=len(cards), num_listed=len(chosen) + len(kept))


def _size(card: Card) -> int:
    return len(card.prompt) + sum(len(a.text) + sum(len(t["text"]) for t in a.turns) for a in card.answers)


def _card(
    comparison: Comparison,
    judges: Sequence[Judged],
    row: int,
    gain: float,
    *,
    disagree: bool,
    rival: tuple[str, Sequence[str]] | None,
) -> Card:
    title, first = TITLES[comparison.method], judges[0]
    sft, policy = comparison.sft, comparison.policy
    scores = (first.sft_scores, first.policy_scores)
    sides = [
        ("fine-tuned (SFT)", "sft", sft.completions[row], sft.rewards, scores[0], None),
        (title, "policy", policy.completions[row], policy.rewards, scores[1], comparison.kl[row]),
    ]
    answers = [
        Answer(
            name=name,
            tone=tone,
            text=completion.response,
            turns=turns_of(completion),
            facts=_facts(completion, None if given is None else given[row], None if rewards is None else rewards[row], kl),
        )
        for name, tone, completion, rewards, given, kl in sides
    ]  # fmt: skip
    if rival:
        answers.append(Answer(name=rival[0], tone="rival", text=rival[1][row]))
    win = float(first.wins[row])
    return Card(
        row=row,
        prompt=comparison.prompts[row].prompt,
        answers=answers,
        gain=None if first.cannot_tell else gain,
        outcome="win" if win > 0.5 else "loss" if win < 0.5 else "tie" if win == 0.5 else "",
        verdicts=[(j.name, _preferred(float(j.wins[row]), title)) for j in judges] if len(judges) > 1 else [],
        disagree=disagree,
        length=policy.completions[row].num_model_tokens,
        kl=comparison.kl[row],
    )


def _preferred(win: float, title: str) -> str:
    return title if win > 0.5 else "SFT" if win < 0.5 else "tie" if win == 0.5 else "no answer"


def _facts(completion: Completion, score: float | None, reward: float | None, kl: float | None) -> str:
    size = completion.num_model_tokens
    parts = [f"{size} token{'' if size == 1 else 's'}"]
    parts += ["cut off"] if completion.truncated else []
    parts += [f"judge {score:+.2f}"] if score is not None else []
    parts += [f"reward {reward:+.2f}"] if reward is not None else []
    parts += [f"KL {kl:.2f}"] if kl is not None else []
    return ", ".join(parts).replace("-", "\u2212")


def as_attributes(card: Card) -> dict[str, Any]:
    """What the list is sorted and filtered by, as data-NAME of the card."""
    return {
        "row": card.row,
        "gain": f"{card.gain or 0:.6g}",
        "outcome": card.outcome,
        "length": card.length,
        "kl": f"{card.kl:.6g}",
        "disagree": int(card.disagree),
    }
