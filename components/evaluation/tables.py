"""The tables of the report, and the sentences about the policy."""

import json
from collections.abc import Mapping, Sequence

from components.evaluation.judging import Judged
from components.rlhf.artifacts.manifest import Fact, Manifest
from components.rlhf.config.policy import TITLES, Method
from components.rlhf.page.costs import StageCost

Facts = Mapping[str, Fact]
# The stage that writes an input of the evaluation, by the kind of the artifact.
WRITERS = {
    "sft_model": "sft", "reward_model": "reward_model", "judge": "judge", "prompts": "prepare_data", "code": "import_code",
}  # fmt: skip


def policy_sentences(facts: Facts) -> list[str]:
    """Which iteration of PPO the policy was exported after and why, and what the guard did, from the facts of its manifest."""
    texts = [str(facts[name]) for name in ("kept_reason", "guard") if name in facts]
    return [f"{text[0].upper()}{text[1:]}." for text in texts if text]


def stage_costs(inputs: Mapping[str, Manifest], measurements: Mapping[str, float], method: Method) -> list[StageCost]:
    """What the evaluation knows of the stages that wrote its inputs, by kind, and of itself; a stage without any number is left out."""
    other = next(title for name, title in TITLES.items() if name != method)
    names = {**WRITERS, "policy_model": method, "evaluation": f"evaluation of {other}"}
    found = [(names.get(kind, kind), manifest.measurements) for kind, manifest in inputs.items()]
    return [
        StageCost(
            stage=stage,
            seconds=numbers.get("seconds"),
            peak_gib=numbers.get("memory/peak_gib"),
            planned_gib=numbers.get("memory/planned_gib"),
        )
        for stage, numbers in [*found, ("evaluation", measurements)]
        if numbers
    ]


def judge_rows(numbers: Mapping[str, float], judges: Sequence[Judged]) -> list[dict[str, str]]:
    """A row for each judge: its agreement with people, a baseline, its consistency, and its win rate or why it has none."""
    rows = []
    for number, judge in enumerate(judges):
        prefix = f"judges/{judge.name}/" if number else ""
        own = {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}
        agreement = judge.entry.agreement
        row = {
            "name": judge.name,
            "kind": judge.entry.settings.kind,
            "agreement": agreement.explain() if agreement else "needs none" if judge.verifies else "not measured",
            "longer": f"{agreement.longer_wins:.1%}" if agreement else "",
            "consistency": f"{own['judge_consistency']:.1%}" if "judge_consistency" in own else "",
            "cost": _cost_text(judge.counts),
            "win_rate": f"cannot tell: {judge.cannot_tell}",
        }
        if "win_rate" in own:
            row["win_rate"] = f"{own['win_rate']:.3f} [{own['win_rate_low']:.3f}, {own['win_rate_high']:.3f}]"
        rows.append(row)
    return rows


def _cost_text(counts: Mapping[str, float]) -> str:
    """What the answers of an endpoint took; empty for other judges."""
    if not counts:
        return ""
    text = f"{counts['requests']:,.0f} requests, {counts['cached']:,.0f} from the cache, "
    text += f"{counts['input_tokens'] + counts['output_tokens']:,.0f} tokens"
    text += f", cost {counts['cost']:.2f}" if counts["cost"] else ""
    without = ", ".join(f"{counts[name]:.0f} {name}" for name in ("refused", "unreadable", "rejected") if counts[name])
    return f"{text}; {without}" if without else text


def lineage_rows(inputs: Mapping[str, Manifest]) -> list[list[str]]:
    """Each input with its digest, that of the settings of its stage, the revision of the code that wrote it, and when."""
    return [
        [role.replace("_", " "), each.digest, each.config_digest, each.code_revision, each.created_at]
        for role, each in inputs.items()
    ]


def settings_text(settings: str) -> str:
    """The settings of the stage, indented."""
    return json.dumps(json.loads(settings), indent=2, ensure_ascii=False) if settings else ""
