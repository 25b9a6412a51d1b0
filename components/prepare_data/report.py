"""Reports the counts of records by source, and the sizes of the data sets."""

from components.prepare_data.prepare import PreparedData


def as_metrics(prepared: PreparedData) -> dict[str, float]:
    metrics = {f"{source}_{key}": float(n) for source, counts in prepared.counts.items() for key, n in counts.items()}
    return metrics | {f"size_{name}": float(n) for name, n in _sizes(prepared).items()}


def as_markdown(prepared: PreparedData) -> str:
    lines = ["# Data", "", "| source | read | kept | dropped |", "|---|---:|---:|---|"]
    for source, counts in prepared.counts.items():
        dropped = [
            f"{n} {key.removeprefix('dropped_').replace('_', ' ')}"
            for key, n in counts.items()
            if "dropped" in key and n
        ]
        lines.append(f"| {source} | {counts['read']:,} | {counts['kept']:,} | {', '.join(dropped) or 'none'} |")
    lines += ["", "Only held-out data sets share prompts:", "", "| data set | records |", "|---|---:|"]
    lines += [f"| {name.replace('_', ' ')} | {size:,} |" for name, size in _sizes(prepared).items()]
    return "\n".join(lines) + "\n"


def _sizes(prepared: PreparedData) -> dict[str, int]:
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
