"""The comparison of PPO and DPO: rows of finished runs, and the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import policies
from benchmarks.record import read_rows
from pipelines.settings import dump_yaml, load_params


def evaluation(method: str, win_rate: float, kl: float) -> dict[str, float]:
    bounds = {"win_rate_low": win_rate - 0.05, "win_rate_high": win_rate + 0.05}
    return {"win_rate": win_rate, "kl": kl, f"distinct2_{method}": 0.6, **bounds}


def finished_run(folder: Path, seed: int, status: str = "succeeded") -> Path:
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(dump_yaml(load_params(policies.PARAMS, policies.settings_of(seed))))
    of_policies: dict[str, Any] = {
        "ppo": {"decision": "promote", "evaluation": evaluation("ppo", 0.7, 3.0)},
        "dpo": {"decision": "reject", "evaluation": evaluation("dpo", 0.5, 1.0)},
    }
    seconds = {"sft": 100.0, "ppo": 250.0, "evaluation": 50.0, "dpo": 80.0, "evaluation-2": 20.0}
    stages = {name: {"seconds": value} for name, value in seconds.items()}
    summary = {"status": status, "method": "ppo", "policies": of_policies, "stages": stages}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_finished_run_becomes_a_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(tmp_path / "failed", 0, "failed")
    finished_run(tmp_path / "other seed", 1)
    finished_run(tmp_path / "own", 0)
    monkeypatch.setattr(policies, "ROWS", tmp_path / "rows.jsonl")
    pages: list[str] = []
    monkeypatch.setattr(policies, "replace_section", lambda path, name, text: pages.append(f"{name}: {text}"))
    for _ in range(2):
        policies.main.callback(seeds=1, out=tmp_path)  # type: ignore[misc]
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["seed"] == 0 and row["seconds"]["dpo"] == 80.0
    assert policies.find_row([row], 0) == row and policies.find_row([row], 1) is None
    assert policies.find_row([row | {"settings_digest": "other"}], 0) is None
    assert pages[0] == pages[1] and pages[0].startswith("policies: | seed |")
    assert "| 0 | PPO | 0.700 [0.650, 0.750] | 3.00 | 0.600 | promote, to the gate | 250 s |" in pages[0]
    assert "| 0 | DPO | 0.500 [0.450, 0.550] | 1.00 | 0.600 | reject | 80 s |" in pages[0]
    assert "add 25% to the time of the other stages" in pages[0]
