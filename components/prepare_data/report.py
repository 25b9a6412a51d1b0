"""What was read, what was dropped and why, and who got the rest."""

from components.prepare_data.prepare import Prepared


def as_metrics(out: Prepared) -> dict[str, float]:
    metrics = {f"{source}_{key}": float(n) for source, counts in out.counts.items() for key, n in counts.items()}
    return metrics | {f"size_{name}": float(n) for name, n in _sizes(out).items()}


def as_markdown(out: Prepared) -> str:
    lines = ["# Data", "", "| source | read | kept | dropped |", "|---|---:|---:|---|"]
    for source, counts in out.counts.items():
        dropped = [
            f"{n} {key.removeprefix('dropped_').replace('_', ' ')}"
            for key, n in counts.items()
            if "dropped" in key and n
        ]
        lines.append(f"| {source} | {counts['read']:,} | {counts['kept']:,} | {', '.join(dropped) or 'none'} |")
    lines += ["", "No prompt occurs in two of these:", "", "| data set | records |", "|---|---:|"]
    lines += [f"| {name.replace('_', ' ')} | {size:,} |" for name, size in _sizes(out).items()]
    return "\n".join(lines) + "\n"


def _sizes(out: Prepared) -> dict[str, int]:
    return {
        "sft": len(out.demonstrations),
        "reward_model_pairs": len(out.pairs),
        "judge_ratings": len(out.judge_ratings),
        "judge_pairs": len(out.judge_pairs),
        "ppo_prompts": len(out.prompts),
        "validation_prompts": len(out.validation_prompts),
        "heldout_prompts": len(out.heldout_prompts),
        "heldout_pairs": len(out.heldout_pairs),
        "heldout_demonstrations": len(out.heldout_demonstrations),
    }
