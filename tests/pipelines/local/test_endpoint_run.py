"""A run on this machine whose deciding judge is an endpoint of known preferences, and its evaluation while the endpoint fails."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.settings import load_params, settings_of_stage
from tests.pipelines.local.test_whole_run import output, run_pipeline, summary_of
from tests.support.judge_server import Answer, JudgeServer, prefers, refusal
from tests.support.toy_pipeline import BAD, GOOD, toy_params, write_data, write_params

pytestmark = pytest.mark.slow


def rank(response: str) -> float:
    """Known preferences between any two texts, which agree with the people of the toy data on good and bad words."""
    words = sum(word in response for word in GOOD) - sum(word in response for word in BAD)
    return 1e9 * words + sum(map(ord, response))


class Run:
    """A finished run, its server, and its evaluation with other answers of the server."""

    def __init__(self, folder: Path, server: JudgeServer) -> None:
        self.folder, self.server = folder, server

    def evaluate(self, target: Path, answer: Answer, **judge: Any) -> tuple[dict[str, float], str, str, str]:
        """Numbers, decision, reason and log of the stage evaluation."""
        self.server.answer = answer
        params = load_params(self.folder / "params.yaml", [f"judge.{key}={value}" for key, value in judge.items()])
        inputs = {
            "sft-model": ("sft", "model"), "policy": ("ppo", "model"), "reward-model": ("reward-model", "model"),
            "judge": ("judge", "judge"), "prompts": ("prepare-data", "heldout_prompts"),
        }  # fmt: skip
        command = [sys.executable, "-m", "components.evaluation", "--settings", settings_of_stage(params, "evaluation")]
        for option, source in inputs.items():
            command += [f"--{option}", str(output(self.folder, *source))]
        for name in ("evaluation", "metrics", "report", "summary", "decision", "reason", "better"):
            command += [f"--{name}", str(target / name)]
        command += [
            "--storage",
            json.dumps({"answers_uri": str(target / "answers")}),
            "--tracking",
            '{"enabled": false}',
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        numbers = json.loads((target / "evaluation" / "evaluation.json").read_text())
        assert json.loads((target / "metrics").read_text()) == numbers
        return numbers, (target / "decision").read_text(), (target / "reason").read_text(), result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("endpoint")
    with JudgeServer(prefers(rank)) as server:
        (folder / "rubric.txt").write_text("Prefer good words,\nand late letters.\n")
        judge = {"kind": "endpoint", "url": server.url, "model": "stub", "rubric_file": "rubric.txt", "max_retries": 0}
        params = toy_params(
            tiny_model,
            write_data(folder),
            storage={"answers_uri": str(folder / "answers")},
            evaluation={"num_prompts": 12, "num_samples": 4},
        )
        result = run_pipeline(write_params(folder / "toy.yaml", params | {"judge": judge}), folder / "run")
        assert result.returncode == 0, result.stdout + result.stderr
        yield Run(folder / "run", server)


def samples(run: Run) -> list[dict[str, Any]]:
    lines = (output(run.folder, "evaluation", "evaluation") / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_win_rate_is_that_of_the_known_preferences(run: Run) -> None:
    rows, numbers = samples(run), summary_of(run.folder)["evaluation_all"]
    assert len(rows) == 48 and len({row["id"] for row in rows}) == 12
    scores = [(rank(row["ppo"]["response"]), rank(row["sft"]["response"])) for row in rows]
    truth = [0.5 if a == b else float(a > b) for a, b in scores]
    assert [row["wins"]["endpoint"] for row in rows] == truth
    assert numbers["win_rate"] == pytest.approx(sum(truth) / 48)
    assert numbers["win_rate_low"] <= sum(truth) / 48 <= numbers["win_rate_high"]
    assert numbers["judge_accuracy"] == numbers["judge_consistency"] == 1.0
    assert numbers["num_compared"] == 12 and numbers["num_unanswered"] == 0
    assert "judge_score_ppo" not in numbers and "win_rate_cut" not in numbers
    page = (run.folder / "report.html").read_text()
    assert "requests, 0 from the cache" in page and "PPO preferred (1) or not (-1)" in page


def test_rubric_reached_the_server(run: Run) -> None:
    assert all(
        body["messages"][0]["content"] == "Prefer good words,\nand late letters." for body in run.server.requests
    )


def test_evaluation_with_an_endpoint_that_is_down(run: Run, tmp_path: Path) -> None:
    numbers, decision, reason, log = run.evaluate(tmp_path, lambda *_: refusal(503, "out of service"))
    assert decision == "reject"
    assert reason.startswith("no verdict: the judge endpoint cannot tell, because http://127.0.0.1:")
    assert "answers 503 (out of service) after 0 retries" in reason
    assert not any(name.startswith("win_rate") for name in numbers)
    assert all(math.isfinite(value) for value in numbers.values())
    assert "Traceback" not in log


def test_evaluation_with_an_endpoint_that_refuses(run: Run, tmp_path: Path) -> None:
    _, decision, reason, _ = run.evaluate(tmp_path, lambda *_: "I would rather not say.")
    assert decision == "reject"
    assert re.search(r"it answered only \d+% of the comparisons \(\d+ unreadable\)$", reason)


def test_evaluation_with_an_endpoint_that_changes_its_mind(run: Run, tmp_path: Path) -> None:
    """It always prefers the first position: all pairs are ties."""
    numbers, decision, reason, _ = run.evaluate(tmp_path, lambda *_: "[[A]]")
    assert numbers["win_rate"] == 0.5
    assert numbers["judge_consistency"] < 0.3  # only equal responses, which are not asked, are consistent
    assert decision == "promote" and reason.startswith("win rate 0.500")  # the gate of the toy run is 0


def test_evaluation_refuses_judges_of_other_settings(run: Run, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has other judges than the settings of this run"):
        run.evaluate(tmp_path, prefers(rank), model="other")
