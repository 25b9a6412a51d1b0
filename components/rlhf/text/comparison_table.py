"""The table that ends a run and opens its report."""

from collections.abc import Mapping


def comparison_rows(numbers: Mapping[str, float]) -> list[dict[str, str]]:
    """The lines of the table, SFT beside PPO."""

    def interval(name: str) -> str:
        return f"{numbers[name]:.3f} [{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]"

    def both(name: str, key: str, form: str) -> dict[str, str]:
        return {"name": name, "sft": format(numbers[f"{key}_sft"], form), "ppo": format(numbers[f"{key}_ppo"], form)}

    return [
        {
            "name": f"judge prefers it, [{100 * numbers['confidence']:g}% interval]",
            "sft": "",
            "ppo": interval("win_rate"),
        },
        {
            "name": f"the same where length and ending are equal ({numbers['num_matched']:.0f} prompts)",
            "sft": "",
            "ppo": interval("win_rate_matched"),
        },
        {"name": "the same with both cut to the shorter one's length", "sft": "", "ppo": interval("win_rate_cut")},
        both("judge's score", "judge_score", ".3f"),
        both("reward model's score", "reward", ".3f"),
        {"name": "KL to the fine-tuned model (nats per response)", "sft": "0", "ppo": interval("kl")},
        both("length (tokens)", "length", ".1f"),
        both("ends by itself (EOS)", "eos_rate", ".1%"),
        both("different word pairs (distinct-2)", "distinct2", ".3f"),
        *(
            {"name": f"{who} agrees with people (held-out pairs)", "sft": "", "ppo": f"{numbers[key]:.1%}"}
            for who, key in (("judge", "judge_accuracy"), ("reward model", "reward_model_accuracy"))
            if key in numbers
        ),
    ]
