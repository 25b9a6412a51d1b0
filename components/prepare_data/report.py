"""Reports what happened to the records of each source, their lengths, and what the model will see."""

import re
from collections import Counter

from components.prepare_data.prepare import PreparedData
from components.rlhf.data.reading import section_of


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
    return metrics | {f"size_{name}": float(n) for name, n in sizes(prepared).items()}


def _slug(phrase: str) -> str:
    return re.sub(r"\W+", "_", phrase).strip("_").lower()


def as_markdown(prepared: PreparedData) -> str:
    lines = ["# Data", "", "| source | read | kept | dropped |", "|---|---:|---:|---|"]
    for key, tally in prepared.tallies.items():
        lines.append(f"| {key} | {tally.read:,} | {tally.kept:,} | {_reasons(tally.dropped)} |")
    lines += ["", "", "| data set | records |", "|---|---:|"]
    lines += [f"| {name.replace('_', ' ')} | {size:,} |" for name, size in sizes(prepared).items()]
    return "\n".join(lines) + "\n"


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common() if n) or "none"


def sizes(prepared: PreparedData) -> dict[str, int]:
    return {
        "sft": len(prepared.demonstrations),
        "reward_model_pairs": len(prepared.pairs),
        "judge_ratings": len(prepared.judge_ratings),
        "judge_pairs": len(prepared.judge_pairs),
        "ppo_prompts": len(prepared.prompts),
        "validation_prompts": len(prepared.validation_prompts),
        "heldout_prompts": len(prepared.heldout_prompts),
        "heldout_pairs": len(prepared.heldout_pairs),
        "heldout_demonstrations": len(prepared.heldout_demonstrations),
    }
