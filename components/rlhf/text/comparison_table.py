"""The comparison of SFT and PPO that ends a run and opens its report."""

from collections.abc import Mapping


def comparison_rows(numbers: Mapping[str, float]) -> list[dict[str, str]]:
    """The rows of the table, each with a name and the formatted values of SFT and PPO.

    Args:
        numbers: The content of evaluation.json. Accuracies that were not measured are left out of the table.
    """

    def interval(name: str) -> str:
        return f"{numbers[name]:.3f} [{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]"

    def both(name: str, key: str, form: str) -> dict[str, str]:
        return {"name": name, "sft": format(numbers[f"{key}_sft"], form), "ppo": format(numbers[f"{key}_ppo"], form)}

    return [
        {
            "name": f"win rate (judge), [{100 * numbers['confidence']:g}% interval]",
            "sft": "",
            "ppo": interval("win_rate"),
        },
        {
            "name": f"win rate at equal length and ending ({numbers['num_matched']:.0f} prompts)",
            "sft": "",
            "ppo": interval("win_rate_matched"),
        },
        {"name": "win rate, both cut to equal length", "sft": "", "ppo": interval("win_rate_cut")},
        both("judge score", "judge_score", ".3f"),
        both("reward model score", "reward", ".3f"),
        {"name": "KL to SFT (nats per response)", "sft": "0", "ppo": interval("kl")},
        both("length (tokens)", "length", ".1f"),
        both("EOS rate", "eos_rate", ".1%"),
        both("distinct-2", "distinct2", ".3f"),
        *(
            {"name": f"{scorer} accuracy (held-out human pairs)", "sft": "", "ppo": f"{numbers[key]:.1%}"}
            for scorer, key in (("judge", "judge_accuracy"), ("reward model", "reward_model_accuracy"))
            if key in numbers
        ),
    ]
