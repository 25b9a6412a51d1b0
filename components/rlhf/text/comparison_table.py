"""The comparison of the SFT model and a policy that ends a run and opens its report."""

from collections.abc import Mapping
from typing import Literal

OTHER_JUDGE = "judges/"


def method_of(numbers: Mapping[str, float]) -> Literal["ppo", "dpo"]:
    """The method that has trained the policy whose numbers these are, which is in their names: length_ppo or length_dpo."""
    return "dpo" if "length_dpo" in numbers else "ppo"


def comparison_rows(numbers: Mapping[str, float]) -> list[dict[str, str]]:
    """The rows of the table, each with a name and the formatted values of sft and policy.

    Args:
        numbers: The content of evaluation.json. What was not measured is left out of the table.
    """

    own = method_of(numbers)

    def interval(key: str) -> str:
        if f"{key}_low" not in numbers:
            return f"{numbers[key]:z.3f}"
        return f"{numbers[key]:z.3f} [{numbers[f'{key}_low']:z.3f}, {numbers[f'{key}_high']:z.3f}]"

    def one(name: str, key: str, form: str = "") -> list[dict[str, str]]:
        """A number of the comparison: with its interval, or in a form."""
        if key not in numbers:
            return []
        return [{"name": name, "sft": "", "policy": format(numbers[key], form) if form else interval(key)}]

    def both(name: str, key: str, form: str) -> list[dict[str, str]]:
        if f"{key}_sft" not in numbers:
            return []
        return [
            {"name": name, "sft": format(numbers[f"{key}_sft"], form), "policy": format(numbers[f"{key}_{own}"], form)}
        ]

    def both_with_intervals(name: str, key: str) -> list[dict[str, str]]:
        if f"{key}_sft" not in numbers:
            return []
        return [{"name": name, "sft": interval(f"{key}_sft"), "policy": interval(f"{key}_{own}")}]

    ends = f", [{100 * numbers['confidence']:g}% interval]"
    others = [key.split("/")[1] for key in numbers if key.startswith(OTHER_JUDGE) and key.endswith("/num_compared")]
    rows = [
        *both_with_intervals("pass@1 (judge)", "pass_at_1"),
        *one("pass@1, gain", "pass_at_1_gain"),
        *[row for name in others for row in both_with_intervals(f"pass@1 ({name})", f"{OTHER_JUDGE}{name}/pass_at_1")],
        *one(f"win rate (judge){ends}", "win_rate"),
        *one("win rate, length-controlled", "win_rate_length_controlled"),
        *one(
            f"win rate at equal length and ending ({numbers.get('num_matched', 0):.0f} responses)", "win_rate_matched"
        ),
        *one("win rate, both cut to equal length", "win_rate_cut"),
        *[row for name in others for row in one(f"win rate ({name})", f"{OTHER_JUDGE}{name}/win_rate")],
        *both("judge score", "judge_score", "z.3f"),
        *both("reward model score", "reward", "z.3f"),
        *one("KL to SFT (nats per response)", "kl"),
        *one("KL to SFT, exact per token", "kl_exact"),
        *both("length (tokens)", "length", ".1f"),
        *both("EOS rate", "eos_rate", ".1%"),
        *both("distinct-2 at equal length", "distinct2", ".3f"),
        *one("judge agreement with people (held-out pairs)", "judge_accuracy"),
        *[
            row
            for name in others
            for row in one(f"{name} agreement with people", f"{OTHER_JUDGE}{name}/judge_accuracy")
        ],
        *one("reward model accuracy (held-out human pairs)", "reward_model_accuracy", ".1%"),
    ]
    return [row | {"sft": "0"} if row["name"].startswith("KL to SFT") else row for row in rows]
