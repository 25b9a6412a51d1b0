"""A run without preferences and without a reward model: additions, rewarded and judged by exact match."""

import json
from pathlib import Path
from typing import Any

from tests.support.toy_pipeline import toy_params

SUBJECTS = ("apples", "pears", "plums", "figs")


def write_additions(folder: Path, *, num_prompts: int = 60) -> dict[str, Path]:
    """Demonstrations and prompts with the column answer, as JSONL files."""
    rows = []
    for n in range(num_prompts):
        a, b = n, 7 * n % 11
        rows.append({"prompt": f"{a} and {b} {SUBJECTS[n % 4]}:", "completion": f" {a + b}", "answer": str(a + b)})
    file = folder / "additions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"demonstrations": file, "prompts": file}


def verifiable_params(model: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """Params of such a run with a few steps per stage; keyword arguments override keys of a section."""
    params = toy_params(model, write_additions(folder))
    del params["reward_model"]
    params["data"]["prompts"]["keep"] = ["answer"]
    params["data"] |= {"near_duplicates": 1.0, "weights": {"sft": 0.5, "prompts": 0.5}}
    params["judge"] = {"kind": "exact_match"}
    params["ppo"]["rewards"] = [{"kind": "exact_match"}]
    for section, values in sections.items():
        known = params.get(section)
        params[section] = known | values if isinstance(known, dict) and isinstance(values, dict) else values
    return params
