"""Reports what happened to the records of each source, how they were split, their lengths, and what the model will see."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from components.prepare_data.examples import CONTEXT, REJECTED, ShownExample, choose, show
from components.prepare_data.prepare import PreparedData
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.data.reading import section_of
from components.rlhf.page.charts import SHAPES, Marks, Series, histogram
from components.rlhf.page.picture import picture
from components.rlhf.page.render import render

NUM_EXAMPLES = {"demonstrations": 4, "preferences": 3, "prompts": 3}
MAX_SHOWN_COLUMNS = 12


def as_counts(prepared: PreparedData) -> dict[str, dict[str, int]]:
    """Records read, kept, dropped and changed by reason, of each section and of the pairs built from ratings."""
    counts: dict[str, Counter[str]] = {}
    for key, tally in prepared.tallies.items():
        section = section_of(key) if key.startswith("data.") else _slug(key)
        counts.setdefault(section, Counter()).update(
            {"read": tally.read, "kept": tally.kept}
            | {f"dropped_{_slug(reason)}": n for reason, n in tally.dropped.items()}
            | {f"changed_{_slug(reason)}": n for reason, n in tally.changed.items() if n}
        )
    return {section: dict(count) for section, count in counts.items()}


def as_metrics(prepared: PreparedData) -> dict[str, float]:
    metrics = {
        f"{section}_{key}": float(n) for section, counts in as_counts(prepared).items() for key, n in counts.items()
    }
    metrics |= {f"size_{_slug(name)}": float(n) for name, n in sizes(prepared).items()}
    if prepared.overlap is not None:
        metrics["prompts_in_two_roles"] = float(prepared.overlap.total)
    return metrics


def _slug(phrase: str) -> str:
    return re.sub(r"\W+", "_", phrase).strip("_").lower()


def sizes(prepared: PreparedData) -> dict[str, int]:
    return {
        "sft": len(prepared.demonstrations),
        "reward model pairs": len(prepared.pairs),
        **({"labeled answers": len(prepared.labeled)} if prepared.labeled else {}),
        "judge ratings": len(prepared.judge_ratings),
        "judge pairs": len(prepared.judge_pairs),
        "ppo prompts": len(prepared.prompts),
        "validation prompts": len(prepared.validation_prompts),
        "heldout prompts": len(prepared.heldout_prompts),
        "heldout pairs": len(prepared.heldout_pairs),
        "heldout demonstrations": len(prepared.heldout_demonstrations),
    }


def source_rows(prepared: PreparedData) -> list[dict[str, str]]:
    """One row per source for a table."""
    return [
        {
            "source": tally.name,
            "read": f"{tally.read:,}",
            "kept": f"{tally.kept:,}",
            "dropped": _reasons(tally.dropped, tally.read),
            "changed": _reasons(tally.changed, tally.read),
            "unread": _columns(tally.unread_columns),
        }
        for tally in prepared.tallies.values()
    ]


def log_lines(prepared: PreparedData, data: DataConfig) -> list[str]:
    lines = [rendering(prepared)]
    for row in source_rows(prepared):
        line = f"{row['source']}: {row['read']} read, {row['kept']} kept"
        line += "".join(f"; {what} {row[what]}" for what in ("dropped", "changed") if row[what] != "none")
        lines.append(line)
    return [*lines, split_statement(prepared, data).replace("**", "")]


def _reasons(counts: Counter[str], total: int) -> str:
    """Each reason with its number and its rate."""
    return ", ".join(f"{n:,} {reason} ({n / total:.1%})" for reason, n in counts.most_common() if n) or "none"


def _columns(names: set[str]) -> str:
    shown = sorted(names)[:MAX_SHOWN_COLUMNS]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) + more) if shown else "none"


def first_cases(prepared: PreparedData) -> list[str]:
    """Where and why a record was dropped: the first case of each reason that is a defect."""
    return [
        f"{reason}: {tally.first[reason]}"
        for tally in prepared.tallies.values()
        for reason, _ in tally.dropped.most_common()
        if reason in tally.defects
    ]


def rendering(prepared: PreparedData) -> str:
    return (
        "All sources are rendered with the model's chat template."
        if prepared.is_chat
        else "All sources are plain texts, without a chat template."
    )


def split_statement(prepared: PreparedData, data: DataConfig) -> str:
    """What the check of the written data sets found."""
    if prepared.overlap is None:
        return "The split was not checked."
    counted = f"{prepared.num_keys:,} different prompts"
    if prepared.num_groups < prepared.num_keys:
        counted += f" in {prepared.num_groups:,} groups of near-duplicates"
    near = (
        "" if data.near_duplicates >= 1 else f" or nearly occurs ({data.near_duplicates:.0%} of its character 5-grams)"
    )
    found = prepared.overlap
    if found.total == 0:
        return f"Checked after the split of {counted}: no prompt of one role occurs{near} in another role."
    examples = "; ".join(
        f"{text[:80]!r} ({role}) and {other_text[:80]!r} ({other})"
        for role, text, other, other_text in found.examples[:3]
    )
    return f"Checked after the split of {counted}: **{found.total:,}** prompts of which each occurs{near} in another role: {examples}."


def length_rows(prepared: PreparedData) -> list[dict[str, str]]:
    """Quantiles of the lengths in tokens of each section."""
    rows = []
    for section, lengths in prepared.lengths.items():
        if not lengths:
            continue
        columns = {"prompt": [each.prompt for each in lengths]}
        if section != "prompts":
            columns["prompt and answer"] = [each.text for each in lengths]
        for name, values in columns.items():
            quantiles = np.percentile(values, [5, 50, 95, 100])
            rows.append(
                {"section": section, "tokens of": name}
                | dict(zip(("5%", "median", "95%", "longest"), (f"{q:,.0f}" for q in quantiles), strict=True))
            )
    return rows


def shown_examples(
    prepared: PreparedData, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> list[ShownExample]:
    """Ten records of the training data sets, as the model will see them."""
    records = {
        "demonstrations": ("demonstration", prepared.demonstrations),
        "preferences": ("preference pair", prepared.pairs),
        "prompts": ("prompt", prepared.prompts),
    }
    return [
        show(f"{title} {number}", record, tokenizer, max_tokens=data.max_tokens)
        for section, (title, candidates) in records.items()
        for number, record in enumerate(choose(candidates, NUM_EXAMPLES[section], seed=seed), start=1)
    ]


def as_markdown(prepared: PreparedData, data: DataConfig, examples: Sequence[ShownExample]) -> str:
    lines = ["# Data", "", rendering(prepared), ""]
    lines += _table(["source", "read", "kept", "dropped", "changed", "columns not read"], source_rows(prepared))
    if cases := first_cases(prepared):
        lines += ["", "The first record of each kind that could not be used:", ""]
        lines += [f"- {_cell(case)}" for case in cases]
    lines += ["", split_statement(prepared, data), "", "| data set | records |", "|---|---:|"]
    lines += [f"| {name} | {size:,} |" for name, size in sizes(prepared).items()]
    lines += ["", "Lengths in tokens:", ""]
    lines += _table(["section", "tokens of", "5%", "median", "95%", "longest"], length_rows(prepared))
    lines += [
        "",
        "What the model sees. \u27e6Brackets\u27e7 mark the tokens that carry loss: answers with their ends.",
        "",
    ]
    for example in examples:
        lines += [
            f"**{example.title}**{' (cut to max_tokens)' if example.is_truncated else ''}",
            "",
            _fenced(example),
            "",
        ]
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(_cell(cell) for cell in row.values())} |" for row in rows]


def _cell(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|")


def _fenced(example: ShownExample) -> str:
    """The example in a code block that its text cannot close."""
    text = ""
    for segment in example.segments:
        if segment.kind == REJECTED:
            text += "\nrejected: "
        elif segment.kind != CONTEXT and segment.kind != "learned":
            text += "\nchosen: "
        text += segment.text if segment.kind == CONTEXT else f"\u27e6{segment.text}\u27e7"
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def as_html(prepared: PreparedData, data: DataConfig, examples: Sequence[ShownExample]) -> str:
    """A self-contained HTML page."""
    return render(
        Path(__file__).with_name("report.html"),
        rendering=rendering(prepared),
        sources=[list(row.values()) for row in source_rows(prepared)],
        cases=first_cases(prepared),
        split=split_statement(prepared, data).replace("**", ""),
        has_overlap=bool(prepared.overlap and prepared.overlap.total),
        sizes=[[name, f"{size:,}"] for name, size in sizes(prepared).items()],
        lengths=[list(row.values()) for row in length_rows(prepared)],
        histograms=histograms(prepared, data),
        examples=examples,
        shapes=SHAPES,
    )


def as_picture(prepared: PreparedData, data: DataConfig) -> str:
    """The lengths of all sections as one SVG."""
    return picture([(name, chart, lines) for name, lines, chart in histograms(prepared, data)])


def histograms(prepared: PreparedData, data: DataConfig) -> list[tuple[str, list[tuple[str, str]], Markup]]:
    """Of each section with records: its name, the names and colors of what is counted, and the chart, with the limits as lines."""
    found = []
    for name, lengths in prepared.lengths.items():
        if not lengths:
            continue
        groups = [(f"prompt (limit {data.max_prompt_tokens:,})", [each.prompt for each in lengths], "sft")]
        limits = [data.max_prompt_tokens]
        if name != "prompts":
            groups.append((f"prompt and answer (limit {data.max_tokens:,})", [each.text for each in lengths], "policy"))
            limits.append(data.max_tokens)
        longest = max(max(tokens) for _, tokens, _ in groups)
        marks = Marks(x=[(limit, "limit") for limit in limits if limit <= 1.2 * longest])
        series = [Series(name=label.partition(" (")[0], values=tokens, tone=tone) for label, tokens, tone in groups]
        label = f"Lengths in tokens of {len(lengths):,} {name}, the longest of {longest:,}"
        chart = histogram(label, series, x_label="tokens", whole=True, num_bins=40, marks=marks)
        found.append((name, [(label, tone) for label, _, tone in groups], chart))
    return found
