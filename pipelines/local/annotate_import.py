"""`kfp-rlhf annotate --import`: answers of people become preferences for the next run."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from components.rlhf.maths.intervals import wilson_interval
from components.rlhf.text.errors import InputError
from pipelines.local.annotate import RANDOM, Pair, as_lines, read_pairs, write
from pipelines.local.annotate_agreement import cohen_kappa, krippendorff_alpha
from pipelines.local.annotate_answers import Given, read_answers

PREFERENCES, AGREEMENT = "preferences.jsonl", "agreement.json"
RELIABLE = 0.667  # Krippendorff's lower limit for tentative conclusions (Content Analysis, 2004, p. 241)


@dataclass(kw_only=True)
class Collected:
    """The answers of all raters by pair; a, b or tie. A skipped pair has no answer."""

    by_pair: dict[str, dict[str, str]] = field(default_factory=dict)  # rater to answer
    num_skipped: int = 0
    changed: list[dict[str, str]] = field(default_factory=list)  # answers that a rater gave differently before

    @property
    def raters(self) -> list[str]:
        return sorted({rater for answers in self.by_pair.values() for rater in answers})

    def of_rater(self, rater: str) -> dict[str, str]:
        return {pair: answers[rater] for pair, answers in self.by_pair.items() if rater in answers}


def collect(pairs: Sequence[Pair], files: Sequence[Path]) -> Collected:
    """The last answer of each rater to each pair. Raises InputError for an answer to a pair that is not among pairs."""
    known, latest, out = {pair.pair for pair in pairs}, dict[tuple[str, str], Given](), Collected()
    for location, given in (each for file in files for each in read_answers(file)):
        if given.pair not in known:
            raise InputError(
                f"{location} answers the pair {given.pair[:40]!r}, which is not among the pairs of this folder; pass the folder from which "
                "it was shown with --out."
            )
        before = latest.get((given.pair, given.rater))
        if before is None or given.time >= before.time:
            latest[given.pair, given.rater] = given
        if before is not None and {before.answer, given.answer} == {"a", "b"}:
            out.changed.append({"pair": given.pair, "rater": given.rater})
    for given in latest.values():
        if given.answer == "skip":
            out.num_skipped += 1
        else:
            out.by_pair.setdefault(given.pair, {})[given.rater] = given.answer
    return out


def import_answers(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Write preferences.jsonl and agreement.json into the folder of the pairs, and return the content of agreement.json.

    A pair becomes a preference if more people chose one side than the other, and more than called it a tie. Raises InputError without
    any preference.
    """
    pairs = read_pairs(folder)
    collected = collect(pairs, files)
    better = {pair.pair: _majority(collected.by_pair.get(pair.pair, {})) for pair in pairs}
    rows = [_preference(p, better[p.pair], collected.by_pair[p.pair]) for p in pairs if better[p.pair] in ("a", "b")]
    if not rows:
        raise InputError(f"The answers contain no preference: nobody chose A or B for any pair of {folder}.")
    summary = summarize(pairs, collected, better)
    write(folder / AGREEMENT, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    write(folder / PREFERENCES, as_lines(iter(rows)))
    return summary


def _majority(answers: Mapping[str, str]) -> str:
    """a, b or tie; "split" if two of them have most votes, and empty without answers."""
    ranked = Counter(answers.values()).most_common()
    if not ranked:
        return ""
    return "split" if len(ranked) > 1 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _preference(pair: Pair, better: str, answers: Mapping[str, str]) -> dict[str, Any]:
    """A row that prepare_data reads as it is."""
    chosen, rejected = (pair.a, pair.b) if better == "a" else (pair.b, pair.a)
    votes = Counter(answers.values())
    as_answer = (lambda text: text) if isinstance(pair.record, str) else _as_message
    return {
        "prompt": pair.record,
        **({"tools": pair.tools} if pair.tools else {}),
        "chosen": as_answer(chosen),
        "rejected": as_answer(rejected),
        "pair": pair.pair,
        "votes": votes[better],
        "votes_against": votes.total() - votes[better],
    }


def _as_message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- agreement ---


def summarize(pairs: Sequence[Pair], collected: Collected, better: Mapping[str, str]) -> dict[str, Any]:
    """What agreement.json says; docs/annotate.md explains it."""
    answers, outcomes = collected.by_pair, Counter(better.values())
    split = [pair.pair for pair in pairs if {"a", "b"} <= set(answers.get(pair.pair, {}).values())]
    kappas = [
        {"raters": [first, second], "pairs": len(one.keys() & two.keys()), "kappa": cohen_kappa(one, two)}
        for first, second in combinations(collected.raters, 2)
        for one, two in [(collected.of_rater(first), collected.of_rater(second))]
        if one.keys() & two.keys()
    ]
    return {
        "pairs": len(pairs),
        "answered": len(answers),
        "raters": {rater: len(collected.of_rater(rater)) for rater in collected.raters},
        "answers": dict(sorted(Counter(a for each in answers.values() for a in each.values()).items())),
        "skipped": collected.num_skipped,
        "preferences": outcomes["a"] + outcomes["b"],
        "ties": outcomes["tie"],
        "without_majority": outcomes["split"],
        "contradictions": [{"pair": pair, "answers": answers[pair]} for pair in split],
        "changed": collected.changed,
        "krippendorff_alpha": krippendorff_alpha([list(each.values()) for each in answers.values()]),
        "cohen_kappa": kappas,
        "with_models": _with_models(pairs, better),
    }


def _with_models(pairs: Sequence[Pair], better: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How often the majority agrees with judge and reward model, and prefers the policy: of the random pairs, and of all others."""
    groups: dict[str, list[Pair]] = {group: [] for group in GROUPS}
    for pair in pairs:
        if better[pair.pair] in ("a", "b"):
            groups["random" if pair.chosen_by == RANDOM else "selected"].append(pair)
    return {
        group: {
            "judge": _share(p.judge == better[p.pair] for p in members if p.judge),
            "reward_model": _share(p.reward_model == better[p.pair] for p in members if p.reward_model),
            "policy": _share((p.a_is if better[p.pair] == "a" else p.b_is) != "SFT" for p in members),
        }
        for group, members in groups.items()
    }


def _share(hits: Iterable[bool]) -> dict[str, Any]:
    found = list(hits)
    interval = wilson_interval(sum(found), len(found), confidence=0.95) if found else None
    return {"hits": sum(found), "of": len(found), "interval": interval}


QUESTIONS = {
    "judge": "agree with the judge",
    "reward_model": "agree with the reward model",
    "policy": "prefer the policy to SFT",
}
GROUPS = {"random": "a random sample", "selected": "selected for disagreement"}


def as_text(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary as lines for a terminal."""
    counts = ", ".join(f"{number} {answer}" for answer, number in summary["answers"].items())
    yield (
        f"{_plural(len(summary['raters']), 'rater')} answered {summary['answered']} of {summary['pairs']} pairs: {counts}, "
        f"{summary['skipped']} skipped."
    )
    yield (
        f"{_plural(summary['preferences'], 'preference')}; left out: {_plural(summary['ties'], 'tie')} and "
        f"{summary['without_majority']} without a majority."
    )
    if summary["contradictions"]:
        number = _plural(len(summary["contradictions"]), "pair")
        yield f"Raters contradict one another on {number}; {AGREEMENT} names them."
    if summary["changed"]:
        yield f"{_plural(len(summary['changed']), 'answer')} of the same person contradict an earlier one; the last counts."
    if len(summary["raters"]) > 1:
        alpha = summary["krippendorff_alpha"]
        text = "undefined (too few common pairs, or all answers alike)" if alpha is None else f"{alpha:.2f}"
        doubt = f"; below {RELIABLE} answers are not reliable" if alpha is not None and alpha < RELIABLE else ""
        yield f"Agreement of raters, Krippendorff's alpha: {text}{doubt}."
    for each in summary["cohen_kappa"]:
        kappa = "undefined" if each["kappa"] is None else f"{each['kappa']:.2f}"
        yield f"  {' and '.join(each['raters'])}: Cohen's kappa {kappa} on {_plural(each['pairs'], 'pair')}"
    for group, title in GROUPS.items():
        for name, verb in QUESTIONS.items():
            yield from _share_as_text(summary["with_models"][group][name], verb, title)


def _share_as_text(share: Mapping[str, Any], verb: str, title: str) -> Iterator[str]:
    if share["of"]:
        low, high = share["interval"]
        yield f"People {verb} on {share['hits']} of {_plural(share['of'], 'pair')} ({title}; 95% interval {low:.2f} to {high:.2f})."


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
