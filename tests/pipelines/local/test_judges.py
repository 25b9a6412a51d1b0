"""A run on this machine with judges of several kinds, resumed after it has finished."""

import json
import sys
from pathlib import Path

import pytest

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import read_manifest
from tests.pipelines.local.test_whole_run import output, run_pipeline, summary_of
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

pytestmark = pytest.mark.slow
SOURCE = '''"""Prefers positive words."""


def score(prompts, responses):
    return [sum(word in text for word in ("good", "fun", "great")) for text in responses]
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run directory."""
    folder = tmp_path_factory.mktemp("judges")
    judges = [{"kind": "function", "function": "positive:score"}, {"kind": "reward_model"}, {"kind": "linear"}]
    params = toy_params(tiny_model, write_data(folder), storage={"publish_uri": str(folder / "published")})
    (folder / "positive.py").write_text(SOURCE)
    result = run_pipeline(write_params(folder / "toy.yaml", params | {"judge": judges}), folder / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "positive.py").unlink()
    return folder / "run"


def tasks_by_preferences(run: Path) -> dict[str, str]:
    """The tasks that train a reward model, by what they were trained on."""
    datasets = {output(run, "prepare-data", name).resolve(): name for name in ("preferences", "judge_preferences")}
    digests = {read_manifest(path).digest: name for path, name in datasets.items()}
    tasks = ("reward-model", "reward-model-2")
    return {digests[read_manifest(output(run, task, "model")).parents["preferences"]]: task for task in tasks}


def test_judge_has_a_reward_model_of_its_own(run: Path) -> None:
    tasks = tasks_by_preferences(run)
    assert set(tasks) == {"preferences", "judge_preferences"}
    judge, ppo = (open_artifact(output(run, stage, name), kind) for stage, name, kind in (
        ("judge", "judge", "judge"), ("ppo", "model", "policy_model")))  # fmt: skip
    second = read_manifest(output(run, tasks["judge_preferences"], "model"))
    first = read_manifest(output(run, tasks["preferences"], "model"))
    assert judge.parents["reward_model"] == second.digest != first.digest
    assert ppo.parents["reward_model"] == first.digest


def test_published_models_are_those_of_their_tasks(run: Path) -> None:
    """Two reward models of one run must not overwrite each other."""
    published = set()
    for task in ("reward-model", "reward-model-2"):
        outputs = json.loads((output(run, task, "executor_output.json")).read_text())
        (artifact,) = outputs["artifacts"]["model"]["artifacts"]
        uri = Path(artifact["metadata"]["published_uri"])
        assert open_artifact(uri, "reward_model").digest == read_manifest(output(run, task, "model")).digest, task
        published.add(uri)
    assert len(published) == 2


def test_resumed_run_reuses_every_stage(run: Path, resident: Resident) -> None:
    """It needs no file of the judge, and both reward models are found whatever order they ran in."""
    for _ in range(3):
        command = [sys.executable, "-m", "pipelines", "run", "--resume", str(run)]
        result = resident.run(command, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        stages = summary_of(run)["stages"]
        assert {name for name, stage in stages.items() if not stage["reused"]} <= {"notify"}
        assert {"reward_model", "reward_model_2"} <= {name.replace("-", "_") for name in stages}
