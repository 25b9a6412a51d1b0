"""Rerun only the stages that a change of settings affects, on the artifacts of a finished run."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import read_rows
from components.rlhf.config.params import Params
from pipelines.local.runner import LocalRun, StageRecord, run_process
from pipelines.local.summary import find_output
from pipelines.settings import settings_of_stage

# Inputs of each stage program (option: producing stage and output), and the options of its outputs.
STAGE_IO: dict[str, tuple[dict[str, tuple[str, str]], tuple[str, ...]]] = {
    "prepare_data": (
        {"tokenizer": ("import_model", "tokenizer")},
        (
            "demonstrations",
            "preferences",
            "judge-preferences",
            "prompts",
            "heldout-prompts",
            "metrics",
            "summary",
            "report",
        ),
    ),
    "sft": (
        {"base-model": ("import_model", "model"), "demonstrations": ("prepare_data", "demonstrations")},
        ("model", "metrics", "summary"),
    ),
    "reward_model": (
        {
            "base-model": ("import_model", "model"),
            "sft-model": ("sft", "model"),
            "preferences": ("prepare_data", "preferences"),
            "prompts": ("prepare_data", "prompts"),
        },
        ("model", "metrics", "roc", "summary"),
    ),
    "judge": (
        {"tokenizer": ("import_model", "tokenizer"), "preferences": ("prepare_data", "judge-preferences")},
        ("judge", "metrics", "summary"),
    ),
    "ppo": (
        {
            "sft-model": ("sft", "model"),
            "reward-model": ("reward_model", "model"),
            "prompts": ("prepare_data", "prompts"),
        },
        ("model", "manifest", "metrics", "curves"),
    ),
    "evaluation": (
        {
            "sft-model": ("sft", "model"),
            "policy": ("ppo", "model"),
            "reward-model": ("reward_model", "model"),
            "judge": ("judge", "judge"),
            "prompts": ("prepare_data", "heldout-prompts"),
        },
        ("evaluation", "metrics", "report", "summary", "decision", "reason", "better"),
    ),
}


def stages_to_run(before: Params, after: Params) -> list[str]:
    """The stages whose settings differ, and all stages downstream of them, in order."""
    changed: list[str] = []
    for stage, (inputs, _) in STAGE_IO.items():
        settings_differ = settings_of_stage(before, stage) != settings_of_stage(after, stage)
        if settings_differ or any(source in changed for source, _ in inputs.values()):
            changed.append(stage)
    return changed


def rerun(run: Path, params: Params, stages: list[str], folder: Path) -> dict[str, Any]:
    """Run the given stages, writing to folder and taking the outputs of all other stages from the finished run.

    Returns time and memory of each stage, metrics and decision of the evaluation, the history of PPO, the scores over
    training, and all responses.
    """
    if params.reward_model_judge:
        sys.exit(
            "a judge of kind reward_model is trained by a task of its own, which cannot be rerun; choose another kind"
        )
    local_run = LocalRun(folder / "logs", environment={}, on_line=lambda _stage, line: print(line, flush=True))

    def output_of(stage: str, name: str) -> Path:
        if stage in stages:
            return folder / stage / name
        found = find_output(run / "artifacts", stage.replace("_", "-"), name.replace("-", "_"))
        if found is None:
            sys.exit(f"{run} has no output {name} of {stage}; resume the run until it is finished")
        return found

    for stage in stages:
        inputs, outputs = STAGE_IO[stage]
        command = ["python", "-m", f"components.{stage}", "--settings", settings_of_stage(params, stage)]
        for option, source in inputs.items():
            command += [f"--{option}", str(output_of(*source))]
        for output in outputs:
            command += [f"--{output}", str(folder / stage / output)]
        record: StageRecord = local_run.start(stage)
        run_process(record, command, local_run, {})
        if record.status == "failed":
            sys.exit(f"{stage}: {record.error}")
    evaluation = output_of("evaluation", "evaluation")
    facts = json.loads((evaluation / "manifest.json").read_text())["facts"]
    return {
        "stages": {
            record.name: {"seconds": round(record.seconds, 1), "peak_memory_bytes": record.peak_memory_bytes}
            for record in local_run.stages
        },
        "evaluation": json.loads((evaluation / "evaluation.json").read_text()),
        "decision": facts["decision"],
        "reason": facts["reason"],
        "history": read_rows(output_of("ppo", "model") / "history.jsonl"),
        "training": read_rows(evaluation / "training.jsonl"),
        "samples": read_rows(evaluation / "samples.jsonl"),
    }
