"""`kfp-rlhf run` on a toy pipeline: every stage as a process through kfp.local, both branches of the gate, and failures."""

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.tracking.texts import database_uri
from pipelines.__main__ import cli
from pipelines.local.chat import chat_with_run
from tests.support.mlflow_database import default_database
from tests.support.planted_secrets import PLANTED, files_with_secrets
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

TRACKED = ["import_model", "prepare_data", "sft", "reward_model", "judge", "ppo", "evaluation", "register"]
STAGES = [*TRACKED, "notify"]


def run_pipeline(params: Path, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an environment full of secrets."""
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | PLANTED | environment)


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run directory of a run whose gate accepts every model."""
    folder = tmp_path_factory.mktemp("toy")
    params = write_params(folder / "toy.yaml", toy_params(tiny_model, write_data(folder)))
    result = run_pipeline(params, folder / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Promoted" in result.stdout
    (folder / "terminal").write_text(result.stdout + result.stderr, encoding="utf-8")
    return folder / "run"


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def output(run: Path, stage: str, name: str) -> Path:
    (found,) = (run / "artifacts").glob(f"*/{stage}/{name}")
    return found


def test_summary_has_every_metric(promoted: Path) -> None:
    summary = summary_of(promoted)
    assert summary["status"] == "succeeded"
    assert summary["promoted"] is True
    assert sorted(summary["stages"]) == sorted(STAGES)
    for stage in summary["stages"].values():
        assert stage["status"] == "succeeded"
        assert stage["seconds"] > 0.5
        assert stage["peak_memory_bytes"] > 50e6
    expected = {
        "num_prompts", "win_rate", "win_rate_low", "win_rate_high", "judge_score_sft", "judge_score_ppo", "reward_sft", "reward_ppo",
        "kl", "length_sft", "length_ppo", "eos_rate_sft", "eos_rate_ppo", "distinct2_sft", "distinct2_ppo",
    }  # fmt: skip
    assert set(summary["evaluation"]) == expected
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in summary["evaluation"].values())
    assert summary["evaluation"]["num_prompts"] == 8
    assert all(Path(path).exists() for path in summary["paths"].values())


def test_every_artifact_verifies_and_names_its_parents(promoted: Path) -> None:
    base = open_artifact(output(promoted, "import-model", "model"), "base_model")
    sft = open_artifact(output(promoted, "sft", "model"), "sft_model")
    reward = open_artifact(output(promoted, "reward-model", "model"), "reward_model")
    policy = open_artifact(output(promoted, "ppo", "model"), "policy_model")
    judge = open_artifact(output(promoted, "judge", "judge"), "judge")
    verdict = open_artifact(output(promoted, "evaluation", "evaluation"), "evaluation")
    assert sft.parents["base_model"] == base.digest
    assert reward.parents["sft_model"] == sft.digest
    assert policy.parents["sft_model"] == sft.digest
    assert policy.parents["reward_model"] == reward.digest
    assert verdict.parents["policy_model"] == policy.digest
    assert verdict.parents["judge"] == judge.digest


def test_models_load_in_transformers(promoted: Path) -> None:
    for stage in ("sft", "ppo"):
        folder = output(promoted, stage, "model")
        AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).chat_template
    reward = AutoModelForSequenceClassification.from_pretrained(output(promoted, "reward-model", "model"))
    assert reward.config.num_labels == 1
    assert reward.config.reward_std > 0
    assert reward.config.padding_side == "right"
    assert reward.config.head_name == "score"


def test_mlflow_has_a_parent_run_and_a_finished_run_per_stage(promoted: Path) -> None:
    with sqlite3.connect(promoted / "mlflow.db") as database:
        runs = dict(database.execute("select name, status from runs").fetchall())
        (curve,) = database.execute("select count(*) from metrics where key = 'score/mean'").fetchone()
        aliases = database.execute("select alias, version from registered_model_aliases").fetchall()
        parents = database.execute(
            "select r.name from runs r join tags t on r.run_uuid = t.run_uuid where t.key = 'rlhf.run_id' and t.value = ?",
            (summary_of(promoted)["run_id"],),
        ).fetchall()
    ((parent,),) = parents
    assert parent.startswith("custom, seed ") and set(runs) == {*TRACKED, parent}
    assert set(runs.values()) == {"FINISHED"}
    assert curve == 2
    assert sorted(aliases) == [("candidate", 1), ("champion", 1)]


def test_champion_of_the_run_answers_a_prompt(promoted: Path) -> None:
    with default_database(database_uri(promoted / "mlflow.db")):
        (answer,) = mlflow.pyfunc.load_model("models:/kfp-rlhf@champion").predict("The film", {"max_new_tokens": 3})
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert isinstance(answer, str)


def test_commands_show_a_finished_run(promoted: Path) -> None:
    def shown(*arguments: str) -> str:
        result = CliRunner().invoke(cli, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    run = str(promoted)
    state = json.loads(shown("status", run, "--follow", "--json"))
    assert state["state"] == "succeeded"
    assert {task["name"]: task["state"] for task in state["tasks"]} == dict.fromkeys(STAGES, "succeeded")
    assert "[ppo] " in shown("logs", run, "ppo")
    assert shown("report", run, "--no-open").strip() == f"{run}/report.html"
    comparison = json.loads(shown("compare", run, run, "--json"))
    assert comparison["parameters"] == [] and ["decision", "promoted", "promoted"] in comparison["results"]


def test_chat_finds_the_models_of_a_run(promoted: Path) -> None:
    config = chat_with_run(promoted)
    assert [(model.name, Path(model.folder)) for model in config.models] == [
        ("SFT", output(promoted, "sft", "model")), ("PPO", output(promoted, "ppo", "model")),
    ]  # fmt: skip
    assert config.reward_model == str(output(promoted, "reward-model", "model"))
    assert config.prompts == str(output(promoted, "prepare-data", "heldout_prompts"))


def test_no_file_of_a_run_contains_a_secret_of_the_environment(promoted: Path) -> None:
    """Models, metadata, logs, MLflow's database and files, compiled pipeline, reports, and the terminal output."""
    assert (promoted / "mlflow.db").stat().st_size > 100_000
    assert list(promoted.glob("logs/*.log")) and (promoted / "pipeline.yaml").is_file()
    assert files_with_secrets(promoted.parent) == []


def test_secret_in_an_error_message_is_redacted_everywhere(tmp_path: Path, tiny_model: Path) -> None:
    params = write_params(tmp_path / "toy.yaml", toy_params(tiny_model, write_data(tmp_path)))
    result = run_pipeline(params, tmp_path / "run", RLHF_PROGRESS_SECONDS=f"5 {PLANTED['HF_TOKEN']}")
    assert result.returncode == 1
    (tmp_path / "terminal").write_text(result.stdout + result.stderr, encoding="utf-8")
    sentence = "RLHF_PROGRESS_SECONDS is '5 ***'; set it to a number of seconds"
    assert sentence in result.stdout
    assert sentence in summary_of(tmp_path / "run")["reason"]
    assert sentence in (tmp_path / "run/logs/import_model.log").read_text(encoding="utf-8")
    assert files_with_secrets(tmp_path) == []


def test_report_is_self_contained(promoted: Path) -> None:
    page = Path(summary_of(promoted)["paths"]["report"]).read_text()
    assert "Promoted" in page
    assert "<svg" in page
    assert not re.search(
        r"<(link|iframe|img)|(?:src|href)\s*=\s*[\"'](?!#)|@import|https?://", page.partition("<!-- settings -->")[0]
    )
    for stage in ("import_model", "register"):  # which the evaluation does not know
        assert f'<th scope="row">{stage}</th>' in page
    assert "num_iterations: " in page  # all parameters


@pytest.mark.slow
def test_own_models_replace_their_stages_and_a_rejected_run_succeeds(
    tmp_path: Path, tiny_model: Path, resident: Resident
) -> None:
    promoted = tmp_path / "promoted"
    params = write_params(tmp_path / "toy.yaml", toy_params(tiny_model, write_data(tmp_path)))
    result = resident.run([sys.executable, "-m", "pipelines", "run", str(params), "--out", str(promoted)], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    own = {
        "sft": {"use": str(output(promoted, "sft", "model"))},
        "reward_model": {"use": str(output(promoted, "reward-model", "model"))},
        "gate": {"min_win_rate": 1.0, "max_kl": 1000.0},
    }
    params = write_params(tmp_path / "own.yaml", toy_params(tiny_model, write_data(tmp_path), **own))
    tracking = f"sqlite:///{promoted / 'mlflow.db'}"
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(tmp_path / "run")]
    result = resident.run([*command, "--set", f"tracking.uri={tracking}"], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "succeeded"
    assert summary["promoted"] is False
    assert "not above 1" in summary["reason"]
    assert "sft" not in summary["stages"]
    assert {"import_model", "import_sft_model", "import_reward_model"} < set(summary["stages"])
    with sqlite3.connect(promoted / "mlflow.db") as database:
        assert database.execute("select alias, version from registered_model_aliases order by alias").fetchall() == [
            ("candidate", 2),
            ("champion", 1),
        ]
        assert database.execute("select count(*) from model_versions").fetchone() == (2,)


def test_failing_stage_ends_the_run_with_its_error_message(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    params = write_params(tmp_path / "broken.yaml", toy_params(tiny_model, data, evaluation={"num_prompts": 500}))
    result = run_pipeline(params, tmp_path / "run")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "failed"
    assert summary["promoted"] is False
    assert "evaluation.num_prompts is 500" in summary["reason"]
    assert summary["stages"]["prepare_data"]["status"] == "failed"
    assert summary["evaluation"] == {}
    assert not any((tmp_path / "run" / "artifacts").glob("*/prepare-data/*"))


def test_invalid_data_line_ends_the_run_before_the_first_stage(tmp_path: Path, tiny_model: Path) -> None:
    data = write_data(tmp_path)
    lines = data["preferences"].read_text().splitlines()
    lines[2] = '{"prompt": "x", "chosen": "y"'
    data["preferences"].write_text("\n".join(lines))
    result = run_pipeline(write_params(tmp_path / "broken.yaml", toy_params(tiny_model, data)), tmp_path / "run")
    assert result.returncode == 1
    assert f"{data['preferences']}:3 is not JSON" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "ppo.num_iteration=3"], "did you mean ppo.num_iterations?"),
        (["--set", "gate.min_win_rate=2"], "gate.min_win_rate is 2"),
        (["--set", "nonsense"], "is not of the form"),
    ],
)
def test_invalid_parameters_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_model: Path, arguments: list[str], sentence: str
) -> None:
    params = write_params(tmp_path / "toy.yaml", toy_params(tiny_model, write_data(tmp_path)))
    result = run_pipeline(params, tmp_path / "run", *arguments)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_non_empty_run_directory_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    params = write_params(tmp_path / "toy.yaml", toy_params(tiny_model, write_data(tmp_path)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    result = run_pipeline(params, tmp_path / "run")
    assert result.returncode == 1
    assert "not an empty folder" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
