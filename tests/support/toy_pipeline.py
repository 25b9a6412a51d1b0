"""A toy pipeline: data with an obvious preference, and params of a run that takes a minute."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

SUBJECTS = ("film", "plot", "cast", "song", "end", "set", "joke", "tale")
GOOD, BAD = ("good", "fun", "great"), ("bad", "dull", "awful")


def write_data(folder: Path, *, num_prompts: int = 60, seed: int = 0) -> dict[str, Path]:
    """Write demonstrations, preferences and prompts as JSONL files; positive completions are preferred."""
    generator = random.Random(seed)
    prompts = [f"{SUBJECTS[n % len(SUBJECTS)]} {n} is" for n in range(num_prompts)]
    rows: dict[str, list[dict[str, str]]] = {
        "demonstrations": [{"prompt": p, "completion": f" {generator.choice(GOOD + BAD)}"} for p in prompts],
        "preferences": [
            {"prompt": p, "chosen": f" {generator.choice(GOOD)}", "rejected": f" {generator.choice(BAD)}"}
            for p in prompts
        ],
        "prompts": [{"prompt": p} for p in prompts],
    }
    files = {}
    for name, records in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return files


def toy_params(model: Path, data: dict[str, Path], **sections: dict[str, Any]) -> dict[str, Any]:
    """Params of a run with a few steps per stage; keyword arguments override keys of a section."""
    training = {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0}
    params: dict[str, dict[str, Any]] = {
        "model": {"source": str(model), "num_frozen_layers": 1, "precision": "fp32"},
        "data": {
            **{name: {"path": str(path)} for name, path in data.items()},
            "held_out": 0.3,
            "num_validation_prompts": 4,
            "max_prompt_tokens": 30,
            "max_tokens": 60,
        },
        "sft": {"max_steps": 4, "batch_size": 8, "training": training},
        "reward_model": {"max_steps": 4, "batch_size": 8, "num_calibration_samples": 8, "training": training},
        "ppo": {
            "num_iterations": 2,
            "minibatch": 4,
            "training": training,
            "eval_every": 1,
            "rollout": {"num_prompts": 8, "sampling": {"max_new_tokens": 6, "batch_size": 8}},
        },
        "evaluation": {"num_prompts": 8, "num_bootstrap": 100},
        "gate": {"min_win_rate": 0.0, "max_kl": 1000.0, "min_prompts": 1},
    }
    for section, values in sections.items():
        params[section] = params.get(section, {}) | values
    return params


def write_params(path: Path, params: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(params), encoding="utf-8")
    return path
