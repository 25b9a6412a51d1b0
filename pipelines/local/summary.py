"""summary.json: the machine-readable result of a run. No number in it is null."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.rlhf.config.params import Params
from components.rlhf.tracking.parent import GOES_TO_GATE
from components.rlhf.tracking.texts import database_file
from pipelines.local.approve import answer_of
from pipelines.local.report import complete_report
from pipelines.local.runner import StageRecord

EVALUATION_METRICS = (
    "num_prompts", "pass_at_1_sft", "pass_at_1_sft_low", "pass_at_1_sft_high", "pass_at_1_ppo", "pass_at_1_ppo_low", "pass_at_1_ppo_high",
    "pass_at_1_gain", "pass_at_1_gain_low", "pass_at_1_gain_high", "win_rate", "win_rate_low", "win_rate_high",
    "judge_score_sft", "judge_score_ppo", "reward_sft", "reward_ppo",
    "kl", "length_sft", "length_ppo", "eos_rate_sft", "eos_rate_ppo", "distinct2_sft", "distinct2_ppo",
)  # fmt: skip
EVALUATION_TASKS = {
    "ppo": ("evaluation",),
    "dpo": ("evaluation",),
    "both": ("evaluation", "evaluation-2"),
}  # by policy.method


def find_output(artifacts: Path, stage: str, output: str) -> Path | None:
    """The path of an output of a stage, ARTIFACTS/PIPELINE/STAGE/OUTPUT, or None."""
    return max(artifacts.glob(f"*/{stage}/{output}"), default=None)


def build_summary(
    params: Params, run: Path, stages: Sequence[StageRecord], *, run_id: str, error: str, tracking_uri: str
) -> dict[str, Any]:
    """The summary of a run that succeeded (error is empty) or failed. Its model and its completed report are put into the run directory."""
    artifacts = run / "artifacts"
    policies = {} if error else _policies(artifacts, EVALUATION_TASKS[params.policy.method])
    method = next((name for name, policy in policies.items() if policy[GOES_TO_GATE]), params.policy.methods[0])
    found = policies.get(method, {"facts": {}, "numbers": {}})
    facts, numbers = found["facts"], found["numbers"]
    promoted, reason = facts.get("decision") == "promote", facts.get("reason", "")
    answer = answer_of(run) if promoted and params.gate.approval == "required" else None
    if answer is not None:
        promoted, reason = answer.approved, f"{reason}; {answer}"
    paths = {
        "run": str(run),
        **_link_outputs(run, artifacts, params.policy.methods, method),
        "tracking": str(database_file(tracking_uri) or tracking_uri),
    }
    summary = {
        "status": "failed" if error else "succeeded",
        "promoted": promoted,
        "reason": error or reason,
        **({"approval": answer.tags()} if answer else {}),
        "run_id": run_id,
        "preset": params.preset,
        "seed": params.seed,
        "stages": {
            stage.name: {
                "status": stage.status,
                "seconds": round(stage.seconds, 3),
                "peak_memory_bytes": stage.peak_memory_bytes,
                "reused": stage.reused,
                "shared_with": stage.shared_with,
                "engines": _engines(artifacts, stage.name),
                "memory": _memory(artifacts, stage.name),
            }
            for stage in stages
        },
        "method": method,
        "policy": _policy(artifacts, method),
        "policies": {name: _verdict(policy) for name, policy in policies.items()},
        "evaluation": _chosen(numbers, method),
        "evaluation_all": numbers,
        "paths": paths,
        "open": _commands(paths, tracking_uri) if numbers else {},
    }
    page, text = run / "report.html", run / "params.yaml"
    if page.is_file() and text.is_file():
        complete_report(page, params, summary["stages"], text.read_text(encoding="utf-8"))
    return summary


def _policies(artifacts: Path, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By method: facts and numbers of the evaluation of each policy, and whether it goes to the gate."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        folder = find_output(artifacts, task, "evaluation")
        if folder is None:
            return {}
        numbers = json.loads((folder / "evaluation.json").read_text())
        facts = json.loads((folder / "manifest.json").read_text())["facts"]
        is_better = numbers.get(GOES_TO_GATE, 1.0) == 1.0
        for other in found.values():  # the last evaluation decides
            other[GOES_TO_GATE] = not is_better
        found[facts["method"]] = {"facts": facts, "numbers": numbers, GOES_TO_GATE: is_better}
    return found


def _verdict(policy: dict[str, Any]) -> dict[str, Any]:
    """What the gate would say about a policy, and its numbers."""
    facts = policy["facts"]
    numbers = _chosen(policy["numbers"], facts["method"])
    return {"decision": facts["decision"], "reason": facts["reason"], "evaluation": numbers}


def _chosen(numbers: dict[str, float], method: str) -> dict[str, float]:
    """The main numbers of an evaluation of a policy of this method."""
    names = [re.sub("_ppo(?=_|$)", f"_{method}", name) for name in EVALUATION_METRICS]
    return {name: numbers[name] for name in names if name in numbers}


def _engines(artifacts: Path, stage: str) -> dict[str, str]:
    """Training and rollout engine of a stage with their versions, from the manifest of its model; {} for other stages."""
    manifest = find_output(artifacts, stage.replace("_", "-"), "model/manifest.json")
    facts = json.loads(manifest.read_text()).get("facts", {}) if manifest else {}
    return {kind: facts[f"{kind}_engine"] for kind in ("training", "rollout") if f"{kind}_engine" in facts}


def _policy(artifacts: Path, method: str) -> dict[str, str | float]:
    """Which policy PPO exported and why, and what its guard did, from the manifest of the policy; {} without one, and of DPO."""
    manifest = find_output(artifacts, method, "model/manifest.json")
    facts = json.loads(manifest.read_text()).get("facts", {}) if manifest else {}
    names = ("kept_iteration", "kept_objective", "kept_kl", "kept_reason", "guard_events", "guard")
    return {name: facts[name] for name in names if name in facts}


def _memory(artifacts: Path, stage: str) -> dict[str, float]:
    """Planned and measured memory of a process of a stage in GiB, from the manifest of what it wrote; {} if nothing was planned."""
    folder, output = stage.replace("_", "-"), "evaluation" if stage.startswith("evaluation") else "model"
    manifest = find_output(artifacts, folder, f"{output}/manifest.json")
    found = json.loads(manifest.read_text()).get("measurements", {}) if manifest else {}
    names = {"planned_gib": "memory/planned_gib", "peak_gib": "memory/peak_gib"}
    return {key: found[name] for key, name in names.items() if "memory/planned_gib" in found}


def _link_outputs(run: Path, artifacts: Path, methods: Sequence[str], method: str) -> dict[str, str]:
    """Put the model of a method, the report and the curves into the run directory; return the paths of model and report.

    A path is "" if it is missing. The report of a run with two policies is that of the last evaluation, which shows both.
    """
    model = find_output(artifacts, method, "model")
    if model:
        (run / "model").unlink(missing_ok=True)
        (run / "model").symlink_to(model.relative_to(run))
    evaluation = "evaluation-2" if len(methods) > 1 else "evaluation"
    pages = [
        (evaluation, "report", "report.html"),
        ("ppo", "curves", "ppo_curves.html"),
        ("dpo", "report", "dpo_curves.html"),
    ]
    for stage, output, name in pages:
        page = find_output(artifacts, stage, output)
        if page:
            shutil.copyfile(page, run / name)
    return {
        name.partition(".")[0]: str(run / name) if (run / name).exists() else "" for name in ("model", "report.html")
    }


def _commands(paths: dict[str, str], tracking_uri: str) -> dict[str, str]:
    """A command that opens each result, for a shell."""
    model = json.dumps(paths["model"], ensure_ascii=False)  # double quotes, which a shell keeps inside of single ones
    code = f'from transformers import pipeline; print(pipeline("text-generation", {model})("This movie"))'
    commands = {
        "report": ["open" if sys.platform == "darwin" else "xdg-open", paths["report"]],
        "model": [sys.executable, "-c", code],
    }
    if tracking_uri:
        commands["tracking"] = [sys.executable, "-m", "pipelines", "ui", paths["run"]]
    return {name: shlex.join(words) for name, words in commands.items()}
