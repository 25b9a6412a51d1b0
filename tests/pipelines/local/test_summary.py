"""summary.json and the terminal of a run with one policy or two, from the artifacts that the evaluations have written."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.rlhf.config.params import Params
from pipelines.local.display import print_summary
from pipelines.local.summary import build_summary
from tests.rlhf.config.test_settings import minimal_params


def write_evaluation(folder: Path, method: str, *, win_rate: float, decision: str, **more: float) -> None:
    numbers = {
        "num_prompts": 8.0, "confidence": 0.95, "win_rate": win_rate, "win_rate_low": 0.1, "win_rate_high": 0.9, "kl": 2.0,
        f"length_{method}": 5.0, "length_sft": 4.0, f"pass_at_1_{method}_low": 0.5, **more,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(numbers))
    facts = {"method": method, "decision": decision, "reason": f"{method} has {win_rate}"}
    (folder / "manifest.json").write_text(json.dumps({"facts": facts, "measurements": {}}))


def write_policy(run: Path, method: str) -> Path:
    folder = run / "artifacts" / "rlhf" / method / "model"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"facts": {}}))
    return folder


def summary_of(run: Path, method: str, error: str = "") -> dict[str, Any]:
    params = Params.model_validate(minimal_params() | {"policy": {"method": method}})
    return build_summary(params, run, [], run_id="r", error=error, tracking_uri="")


def printed(summary: dict[str, Any]) -> str:
    file = io.StringIO()
    print_summary(Console(file=file, width=200), summary)
    return file.getvalue()


@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_one_policy(tmp_path: Path, method: str) -> None:
    write_evaluation(
        tmp_path / "artifacts/rlhf/evaluation/evaluation",
        method,
        win_rate=0.6,
        decision="promote",
        **{f"reward_{method}": 1.0},
    )
    model = write_policy(tmp_path, method)
    summary = summary_of(tmp_path, method)
    assert (summary["method"], summary["promoted"], summary["reason"]) == (method, True, f"{method} has 0.6")
    assert set(summary["policies"]) == {method}
    expected = {f"length_{method}", f"reward_{method}", f"pass_at_1_{method}_low", "length_sft", "win_rate", "kl"}
    assert expected < set(summary["evaluation"])
    assert (tmp_path / "model").resolve() == model
    text = printed(summary)
    assert f"{method.upper()} against SFT on 8 held-out prompts" in text and "does not go to the gate" not in text


@pytest.mark.parametrize(("better", "other"), [("ppo", "dpo"), ("dpo", "ppo")])
def test_two_policies(tmp_path: Path, better: str, other: str) -> None:
    rates = {"ppo": 0.6, "dpo": 0.7}
    decisions = {better: "promote", other: "reject"}
    for task, method in (("evaluation", "ppo"), ("evaluation-2", "dpo")):
        more = {"goes_to_gate": float(better == "dpo")} if method == "dpo" else {}
        folder = tmp_path / "artifacts/rlhf" / task
        write_evaluation(folder / "evaluation", method, win_rate=rates[method], decision=decisions[method], **more)
        (folder / "report").write_text(task)
    models = {method: write_policy(tmp_path, method) for method in rates}
    summary = summary_of(tmp_path, "both")
    assert (summary["method"], summary["promoted"]) == (better, True)
    assert {name: policy["decision"] for name, policy in summary["policies"].items()} == decisions
    assert summary["evaluation"]["win_rate"] == summary["evaluation_all"]["win_rate"] == rates[better]
    assert (tmp_path / "model").resolve() == models[better]
    assert (tmp_path / "report.html").read_text() == "evaluation-2"  # it shows both
    text = printed(summary)
    assert f"{better.upper()} against SFT on 8 held-out prompts" in text
    assert f"{other.upper()} does not go to the gate, which would reject it: {other} has {rates[other]}." in text


def test_run_that_failed_between_the_evaluations_has_no_numbers(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "artifacts/rlhf/evaluation/evaluation", "ppo", win_rate=0.6, decision="promote")
    summary = summary_of(tmp_path, "both", error="evaluation-2: it failed")
    assert (summary["status"], summary["promoted"], summary["evaluation"]) == ("failed", False, {})
    assert "it failed" in printed(summary)
