"""What the numbers of an evaluation say, as short answers to the questions that readers of a report have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from components.evaluation.judge_curve import over_optimization
from components.evaluation.judging import Judged
from components.rlhf.artifacts.manifest import Fact
from components.rlhf.config.policy import TITLES
from components.rlhf.text.comparison_table import method_of

FINDINGS = "findings.json"
Tone = Literal["good", "bad", "open"]
REPEATS = -0.05  # a relative change of distinct-2 below which a reader should look
AS_GOOD = 0.5  # the win rate of a policy that is as good as the SFT model
# Win rates without the effect of length, those with the fewest assumptions first.
AT_EQUAL_LENGTH = {
    "win_rate_cut": "with both cut to equal length",
    "win_rate_matched": "on responses of equal length and ending",
    "win_rate_length_controlled": "by a model of the length",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    question: str
    answer: str
    detail: str  # a sentence with the numbers
    tone: Tone


def findings_of(
    numbers: Mapping[str, float],
    judges: Sequence[Judged],
    training: Sequence[Mapping[str, float]],
    policy: Mapping[str, Fact],
) -> list[Finding]:
    """A question that was not measured is left out. policy are facts of the policy's manifest."""
    found = [
        _is_better(numbers),
        _is_only_length(numbers),
        over_optimizes(numbers, training, policy.get("kept_iteration")),
        _repeats(numbers),
        _can_be_trusted(judges[0]),
    ]
    return [finding for finding in found if finding]


def save_findings(findings: Sequence[Finding], folder: Path) -> None:
    """Write findings.json, from which the card of an exported model takes them."""
    rows = [asdict(finding) for finding in findings]
    (folder / FINDINGS).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def interval_text(numbers: Mapping[str, float], name: str) -> str:
    """A number with its interval, as in the table."""
    return f"{numbers[name]:.3f} [{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]"


def _is_better(numbers: Mapping[str, float]) -> Finding | None:
    question = f"Is {TITLES[method_of(numbers)]} better than the fine-tuned model?"
    if "win_rate" not in numbers:
        return None
    low, high = numbers["win_rate_low"], numbers["win_rate_high"]
    interval = f"the {100 * numbers['confidence']:g}% interval of the win rate, {low:.3f} to {high:.3f}, "
    if low > AS_GOOD:
        return Finding(question=question, answer="Yes", detail=f"{interval.capitalize()}is above 0.5.", tone="good")
    if high < AS_GOOD:
        return Finding(question=question, answer="No", detail=f"{interval.capitalize()}is below 0.5.", tone="bad")
    detail = f"{interval.capitalize()}contains 0.5; more held-out prompts make it narrower."
    return Finding(question=question, answer="Not shown", detail=detail, tone="open")


def _is_only_length(numbers: Mapping[str, float]) -> Finding | None:
    known = {name: words for name, words in AT_EQUAL_LENGTH.items() if f"{name}_low" in numbers}
    if not known or not numbers["win_rate_low"] > AS_GOOD:
        return None
    rates = "; ".join(f"{words} {interval_text(numbers, name)}" for name, words in known.items())
    detail = f"The win rate {rates}."
    question = "Does it only win by length?"
    if numbers[f"{next(iter(known))}_low"] > AS_GOOD:
        return Finding(question=question, answer="No", detail=detail, tone="good")
    return Finding(question=question, answer="It may", detail=detail, tone="bad")


def over_optimizes(
    numbers: Mapping[str, float], training: Sequence[Mapping[str, float]], kept: Fact | None
) -> Finding | None:
    """kept is the iteration of the exported policy. None of DPO, and without scores of both reward and judge."""
    if method_of(numbers) == "dpo":
        return None
    question, gap = "Does it over-optimize its reward?", ""
    if "reward_win_rate" in numbers and "win_rate" in numbers:
        gap = f" Win rate by the reward model {numbers['reward_win_rate']:.3f}, by the judge {numbers['win_rate']:.3f}."
    if len(training) < 2 or not all("judge_score" in row for row in training):
        return Finding(question=question, answer="Compare", detail=gap.strip(), tone="open") if gap else None
    found = over_optimization(training)
    if found is None:
        detail = (
            f"In no validation pass after the judge's best one is the reward higher and the judge's score lower.{gap}"
        )
        return Finding(question=question, answer="Not seen", detail=detail, tone="good")
    best, worst = found.best, found.worst
    detail = (
        f"From iteration {best['iteration']:.0f} (KL {best['kl']:.2f}) to {worst['iteration']:.0f} (KL {worst['kl']:.2f}) the reward "
        f"rises from {best['reward']:.3f} to {worst['reward']:.3f}, and the judge's score falls from {best['judge_score']:.3f} to "
        f"{worst['judge_score']:.3f}"
    )
    if "judge_fall_se" in worst:
        detail += f", by {worst['judge_fall']:.3f} with a standard error of {worst['judge_fall_se']:.3f}"
    detail += "." if found.is_clear else ", which is within noise."
    is_inside = kept is None or any(row["iteration"] == float(kept) for row in found.later)
    if kept is not None:
        place = "is one of these later passes" if is_inside else "is none of these later passes"
        detail += f" The exported policy, after iteration {float(kept):.0f}, {place}."
    if not found.is_clear:
        return Finding(question=question, answer="Not clear", detail=f"{detail}{gap}", tone="open")
    answer = "Yes" if is_inside else "Not the exported one"
    return Finding(question=question, answer=answer, detail=f"{detail}{gap}", tone="bad" if is_inside else "open")


def _repeats(numbers: Mapping[str, float]) -> Finding | None:
    own = method_of(numbers)
    sft, policy = numbers.get("distinct2_sft"), numbers.get(f"distinct2_{own}")
    if not sft or policy is None:
        return None
    change = policy / sft - 1
    answer = f"{change:+.0%} unique word pairs".replace("-", "\u2212")
    detail = (
        f"Of the word pairs {sft:.1%} are unique in the responses of the fine-tuned model and {policy:.1%} in those of {TITLES[own]}, "
        f"both cut to equal length; {numbers['eos_rate_sft']:.1%} and {numbers[f'eos_rate_{own}']:.1%} of the responses end by themselves."
    )
    return Finding(
        question="Does it repeat itself more?",
        answer=answer,
        detail=detail,
        tone="good" if change > REPEATS else "open",
    )


def _can_be_trusted(judge: Judged) -> Finding | None:
    question = f"Can the judge {judge.name} be relied on?"
    if judge.cannot_tell:
        detail = f"It cannot tell, because {judge.cannot_tell}."
        return Finding(question=question, answer="No", detail=detail, tone="bad")
    if judge.verifies:
        detail = "It verifies answers and needs no agreement with people."
        return Finding(question=question, answer="It verifies", detail=detail, tone="good")
    agreement = judge.entry.agreement
    if agreement is None:
        return Finding(question=question, answer="Unknown", detail="It was not compared with people.", tone="open")
    detail = (
        f"It agrees with people on {agreement.explain()}; always preferring the longer text does on {agreement.longer_wins:.1%}, and "
        "chance on 50%."
    )
    return Finding(question=question, answer=f"{agreement.accuracy:.0%} agreement", detail=detail, tone="good")
