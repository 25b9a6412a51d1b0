"""Whole runs without preferences and a reward model on a tiny model: rewarded and judged by exact match, and by code of the user."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import PreferencePair, Prompt, ValidationSample
from tests.support.resident import Resident
from tests.support.toy_pipeline import write_params
from tests.support.verifiable import verifiable_params

pytestmark = pytest.mark.slow
FUNCTION = """
import words

def score(prompts, responses, columns):
    assert all(row["answer"].isdigit() for row in columns)
    return [words.digits(response) for response in responses]
"""
STAGES = {"import_model", "prepare_data", "sft", "judge", "ppo", "evaluation", "register", "notify"}


def run(resident: Resident, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    params = write_params(folder / "params.yaml", content)
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(folder / "run")]
    result = resident.run(command, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return summary | {"terminal": result.stdout}


def output(folder: Path, name: str) -> Path:
    (found,) = (folder / "run" / "artifacts").glob(f"*/{name}")
    return found


@pytest.fixture(scope="module")
def critic_free(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, resident: Resident
) -> tuple[Path, dict[str, Any]]:
    """A run with rloo, exact match and a function in a folder of code."""
    folder = tmp_path_factory.mktemp("verifiable")
    (folder / "mycode").mkdir()
    (folder / "mycode" / "mine.py").write_text(FUNCTION)
    (folder / "mycode" / "words.py").write_text("def digits(text):\n    return sum(map(str.isdigit, text)) / 10\n")
    content = verifiable_params(tiny_model, folder, code={"path": "mycode"})
    content["ppo"] |= {"advantage": "rloo", "minibatch": 8}
    content["ppo"]["rewards"] = [
        {"kind": "exact_match"}, {"kind": "function", "function": "mine:score", "weight": 0.5}
    ]  # fmt: skip
    content["ppo"]["rollout"]["samples_per_prompt"] = 2
    content["evaluation"] |= {"num_samples": 2}
    return folder, run(resident, folder, content)


def test_run_has_no_reward_model_and_succeeds(critic_free: tuple[Path, dict[str, Any]]) -> None:
    _, summary = critic_free
    assert summary["status"] == "succeeded" and summary["promoted"] is True
    assert set(summary["stages"]) == STAGES | {"import_code"}
    names = set(summary["evaluation"])
    assert {"pass_at_1_sft", "pass_at_1_ppo_low", "pass_at_1_gain", "win_rate", "kl"} <= names
    assert not [name for name in summary["evaluation_all"] if name.startswith("reward")]
    assert "pass@1 (judge)" in summary["terminal"] and "reward model" not in summary["terminal"]


def test_answers_travel_to_every_stage_that_needs_them(critic_free: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = critic_free
    for name, split in (("prompts", "train"), ("prompts", "validation"), ("heldout_prompts", "heldout")):
        prompts = load_records(output(folder, f"prepare-data/{name}"), split, Prompt)
        assert prompts and all(set(p.columns) == {"answer"} and p.columns["answer"].isdigit() for p in prompts)
    samples = load_records(output(folder, "ppo/model"), "validation", ValidationSample)
    assert samples and all(sample.prompt.columns for sample in samples)
    for name in ("preferences", "judge_preferences"):
        assert load_records(output(folder, f"prepare-data/{name}"), "heldout", PreferencePair) == []


def test_digest_of_the_code_is_in_the_lineage(critic_free: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = critic_free
    code = open_artifact(output(folder, "import-code/code"), "code")
    assert set(code.files) == {"mine.py", "words.py"}
    policy = open_artifact(output(folder, "ppo/model"), "policy_model")
    assert set(policy.parents) == {"sft_model", "prompts", "code"}
    for name, kind in (
        ("ppo/model", "policy_model"),
        ("judge/judge", "judge"),
        ("evaluation/evaluation", "evaluation"),
    ):
        assert open_artifact(output(folder, name), kind).parents["code"] == code.digest


def test_report_speaks_of_no_reward_model(critic_free: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = critic_free
    page = (folder / "run" / "report.html").read_text()
    assert "pass@1 (judge)" in page and "needs none" in page and "reward model" not in page


def test_critic_without_a_reward_model_starts_from_the_sft_model(
    tmp_path: Path, tiny_model: Path, resident: Resident
) -> None:
    summary = run(resident, tmp_path, verifiable_params(tiny_model, tmp_path))  # gae
    assert set(summary["stages"]) == STAGES
    policy = open_artifact(output(tmp_path, "ppo/model"), "policy_model")
    assert set(policy.parents) == {"sft_model", "prompts"}
    assert "value_explained_variance" in policy.facts
