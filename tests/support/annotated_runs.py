"""Run directories with an evaluation whose numbers are written by hand, for annotate."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.manifest import write_manifest


def sample(
    number: int, sft: str, policy: str, *, win: float | None, rewards: tuple[float, float] | None = None, **more: Any
) -> dict[str, Any]:
    """A row of samples.jsonl. win is the judge's: 1 for the policy. rewards are those of SFT and policy."""
    own = [{"reward": reward} for reward in rewards] if rewards else [{}, {}]
    return {
        "id": f"heldout-{number}",
        "prompt": f"Prompt {number}",
        "sft": {"response": sft, **own[0]},
        "ppo": {"response": policy, **own[1]},
        "wins": {"linear": win},
        **more,
    }


def write_run(
    folder: Path, samples: Sequence[Mapping[str, Any]], conversations: Mapping[str, Any] | None = None
) -> Path:
    """A finished run with these samples. conversations are those of chat prompts, by id."""
    heldout = folder / "artifacts/rlhf/prepare-data/heldout_prompts"
    evaluation = folder / "artifacts/rlhf/evaluation/evaluation"
    for path in (heldout, evaluation):
        path.mkdir(parents=True)
    prompts = {row["id"]: row["prompt"] for row in samples}
    rows = [{"id": i, "prompt": p, "conversation": (conversations or {}).get(i)} for i, p in prompts.items()]
    (heldout / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    write_manifest(heldout, kind="prompts")
    write_manifest(evaluation, kind="evaluation")
    (folder / "run.json").write_text("{}")
    (folder / "params.yaml").write_text("preset: tiny\nseed: 7\n")
    return folder
