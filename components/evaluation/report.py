"""The report of the comparison: a self-contained HTML page, and the same as Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.evaluation.cards import RANDOM, REST, Card, Listing, as_attributes, list_cards
from components.evaluation.compare import Comparison
from components.evaluation.figures import (
    length_figure,
    reward_against_kl,
    score_figures,
    training_figures,
    training_table,
    win_rate_rows,
)
from components.evaluation.findings import Finding, findings_of, over_optimizes
from components.evaluation.judging import Judged
from components.evaluation.rival import Rival
from components.evaluation.side_by_side import SideBySide
from components.evaluation.tables import Facts, judge_rows, lineage_rows, policy_sentences, settings_text
from components.evaluation.verdict import Decision
from components.rlhf.artifacts.check_rows import CheckRow, check_cells, check_head
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.policy import TITLES
from components.rlhf.page.charts import SHAPES
from components.rlhf.page.costs import StageCost, cost_table, costs_part
from components.rlhf.page.picture import picture
from components.rlhf.page.render import render
from components.rlhf.page.scale import number_text
from components.rlhf.text.comparison_table import comparison_rows, method_of

Rows = Sequence[Mapping[str, float]]
FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Background:
    """What a report tells beside the comparison."""

    policy: Facts = field(default_factory=dict)  # of the policy's manifest
    both: SideBySide | None = None  # the policy beside the other one of the run
    rival: Rival | None = None  # the evaluation of the other policy
    costs: Sequence[StageCost] = ()
    inputs: Mapping[str, Manifest] = field(default_factory=dict)  # by kind
    settings: str = ""  # of the stage, as JSON
    max_kl: float | None = None  # of the gate
    checks: Sequence[CheckRow] = ()  # beside the judge


NOTHING = Background()
DECIDED = {"promote": "Promoted", "reject": "Rejected"}


def as_html(
    comparison: Comparison,
    judges: Sequence[Judged],
    numbers: Mapping[str, float],
    verdict: Decision,
    training: Rows,
    *,
    seed: int,
    background: Background = NOTHING,
) -> str:
    """A self-contained HTML page, which is complete without scripts. training has one row per validation pass, and may be empty."""
    title, rival = TITLES[comparison.method], background.rival
    curve, kept, trained = training, background.policy.get("kept_iteration"), title
    if not training and rival:  # the curves of PPO are those of the other policy
        curve, kept, trained = rival.training, rival.facts.get("kept_iteration"), TITLES[rival.method]
    gives_scores = judges[0].policy_scores is not None and not judges[0].cannot_tell
    listing = listing_of(comparison, judges, seed, rival)
    return render(
        FOLDER / "report.html",
        method=title,
        numbers=numbers,
        verdict=verdict,
        headlines=headlines(numbers, verdict, rival, background.both),
        findings=all_findings(judges, numbers, training, background),
        names=" and ".join(TITLES[method] for method in ([rival.method] if rival else []) + [comparison.method]),
        policy=policy_sentences(background.policy),
        rows=[[row["name"], row["sft"], row["policy"]] for row in comparison_rows(numbers)],
        win_rates=win_rate_rows(numbers, judges),
        both=background.both,
        judges=judge_rows(numbers, judges),
        check_head=check_head(title),
        checks=[check_cells(row) for row in background.checks],
        agreements=[(judge.name, judge.entry.agreement) for judge in judges if judge.entry.agreement],
        kappas=[(*key.split("/")[1:], value) for key, value in numbers.items() if key.startswith("kappa/")],
        trained=trained,
        optimized=over_optimizes(rival.numbers if trained != title and rival else numbers, curve, kept),
        against_kl=reward_against_kl(curve, kept),
        curves=training_figures(curve, kept, background.max_kl),
        curve_table=training_table(curve),
        score_figures=score_figures(comparison, judges[0]),
        length_figure=length_figure(comparison),
        listing=listing,
        attributes=as_attributes,
        random_group=RANDOM,
        gain="judge score gain" if gives_scores else f"{title} preferred (1) or not (-1)",
        gain_form="%+.2f",
        costs=costs_part(background.costs, is_complete=False),
        lineage=lineage_rows(background.inputs),
        settings=settings_text(background.settings),
        shapes=SHAPES,
    )  # fmt: skip


def as_picture(training: Rows, background: Background) -> str:
    """Reward and judge against the KL, and the curves of the validation passes, as one SVG; "" without validation passes."""
    kept = background.policy.get("kept_iteration")
    figures = [reward_against_kl(training, kept), *training_figures(training, kept, background.max_kl)]
    return picture([(figure.title, figure.chart, figure.legend) for figure in figures if figure])


def listing_of(comparison: Comparison, judges: Sequence[Judged], seed: int, rival: Rival | None) -> Listing:
    """The pairs of responses that the report lists, with those of the other policy."""
    others = (TITLES[rival.method], rival.responses) if rival else None
    return list_cards(comparison, judges, seed=seed, rival=others)


def headlines(
    numbers: Mapping[str, float], verdict: Decision, rival: Rival | None, both: SideBySide | None
) -> list[dict[str, Any]]:
    """The decision and the win rate of each policy of the run, that of the comparison last."""
    own = method_of(numbers)
    found = [(rival.method, rival.outcome.decision, str(rival.facts.get("reason", "")), rival.numbers)] if rival else []
    return [
        {
            "title": TITLES[method],
            "decision": decision,
            "reason": reason,
            "word": "No verdict" if reason.startswith("no verdict") else DECIDED[decision],
            "numbers": values,
            "goes_to_gate": both is not None and both.better.method == method,
        }
        for method, decision, reason, values in [*found, (own, verdict.decision, verdict.reason, numbers)]
    ]


def all_findings(
    judges: Sequence[Judged], numbers: Mapping[str, float], training: Rows, background: Background
) -> list[tuple[str, list[Finding]]]:
    """What the numbers of each policy of the run say, by the name of the policy."""
    rival = background.rival
    others = [(TITLES[rival.method], findings_of(rival.numbers, judges, rival.training, rival.facts))] if rival else []
    return [*others, (TITLES[method_of(numbers)], findings_of(numbers, judges, training, background.policy))]


def as_markdown(
    numbers: Mapping[str, float],
    judges: Sequence[Judged],
    verdict: Decision,
    training: Rows = (),
    background: Background = NOTHING,
    listing: Listing | None = None,
) -> str:
    """The report without pictures, with the selected samples of a listing."""
    policy, both = background.policy, background.both
    title = TITLES[method_of(numbers)]
    decision = both.better.decision if both else verdict.decision
    found = headlines(numbers, verdict, background.rival, both)
    lines = [f"# {decision.capitalize()}", "", *([both.reason, ""] if both else [])]
    lines += [
        f"- {h['title']}: {h['word'].lower()}, {h['reason']}." if len(found) > 1 else f"{h['reason']}." for h in found
    ]
    lines += [""]
    lines += [line for sentence in policy_sentences(policy) for line in (sentence, "")]
    for name, findings in all_findings(judges, numbers, training, background):
        lines += [f"{name}:", ""] if background.rival else []
        lines += [*(f"- {f.question} **{f.answer}.** {f.detail}" for f in findings), ""]
    lines += [*_table(["", "SFT", title], [[r["name"], r["sft"], r["policy"]] for r in comparison_rows(numbers)])]
    rows = [[row[name] for name in ("name", "agreement", "win_rate")] for row in judge_rows(numbers, judges)]
    lines += ["", *_table(["judge", "agreement with people", "win rate"], rows, numbers=False)]
    if background.checks:
        cells = [check_cells(row) for row in background.checks]
        lines += ["", "## Checks", "", *_table(check_head(title), cells, numbers=False)]
    if both:
        lines += ["", f"## {' and '.join(both.head[1:])} side by side", ""]
        lines += _table(["", *both.head], both.rows)
    if training:
        head, passes = training_table(training)
        lines += ["", "## Validation passes of the training", "", *_table(head, passes)]
    for group, cards in listing.groups.items() if listing else ():
        if group != REST:
            lines += ["", f"## {group}", *(line for card in cards for line in _card_lines(card))]
    if background.costs:
        head, costs = cost_table(background.costs)
        lines += ["", "## Cost of the stages that the evaluation knows", "", *_table(head, costs)]
    return "\n".join(lines) + "\n"


def _card_lines(card: Card) -> list[str]:
    """A prompt and its responses in a code block, which no text in it can close."""
    said = [f"prompt: {card.prompt}"]
    for answer in card.answers:
        said += ["", f"{answer.name}: {answer.text}"]
    text = "\n".join(said)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    gain = "" if card.gain is None else f", gain {number_text(card.gain, 2)}"
    return ["", f"Prompt {card.row + 1}{gain}:", "", f"{fence}text", text, fence]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """A Markdown table; the columns after the first one are numbers, to the right."""
    lines = [
        f"| {' | '.join(head)} |".replace("|  |", "| |"),
        "|---" + ("|---:" if numbers else "|---") * (len(head) - 1) + "|",
    ]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
