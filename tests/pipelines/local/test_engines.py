"""Whole stages in two processes: the user's command, the same models as one process makes, and what happens when one dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipelines.settings import load_params, settings_of_stage
from tests.support.toy_pipeline import toy_params, write_data, write_params

pytestmark = pytest.mark.deepspeed
STAGES = ("sft", "reward_model", "ppo")
UNSHARED = ["model.num_frozen_layers=0"]
SHARDED = [
    *UNSHARED,
    *(f"{stage}.training.{key}" for stage in STAGES for key in ("engine=deepspeed", "zero_stage=3", "num_processes=2")),
]


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return write_params(folder / "toy.yaml", toy_params(tiny_model, write_data(folder)))


def run_pipeline(params: Path, name: str, settings: list[str]) -> Path:
    out = params.parent / name
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def one(params: Path) -> Path:
    return run_pipeline(params, "one", UNSHARED)


@pytest.fixture(scope="module")
def two(params: Path) -> Path:
    return run_pipeline(params, "two", SHARDED)


def output(run: Path, stage: str, name: str = "model") -> Path:
    (found,) = (run / "artifacts").glob(f"*/{stage}/{name}")
    return found


class TestWholeRun:
    @pytest.mark.parametrize("stage", ["sft", "reward-model", "ppo"])
    def test_sharded_over_two_processes_makes_the_same_model(self, one: Path, two: Path, stage: str) -> None:
        ours, theirs = (load_file(output(run, stage) / "model.safetensors") for run in (one, two))
        assert ours.keys() == theirs.keys()
        gaps = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
        assert gaps.max() < 2e-4 and gaps.mean() < 1e-5

    def test_the_policy_is_an_ordinary_model(self, two: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(two / "model")
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()

    def test_rows_and_validation_are_of_both_processes(self, one: Path, two: Path) -> None:
        for name in ("history.jsonl", "validation.jsonl"):
            ours, theirs = (
                [json.loads(line) for line in (output(run, "ppo") / name).read_text().splitlines()]
                for run in (one, two)
            )
            assert len(ours) == len(theirs) > 0
            for a, b in zip(ours, theirs, strict=True):
                same = {key: value for key, value in a.items() if isinstance(value, float) and "seconds" not in key}
                assert {key: b[key] for key in same} == pytest.approx(same, rel=1e-3, abs=2e-4)
        assert json.loads((two / "summary.json").read_text())["stages"]["ppo"]["status"] == "succeeded"

    def test_the_summary_names_what_trained(self, one: Path, two: Path) -> None:
        for run, name in ((one, f"torch {torch.__version__}"), (two, "deepspeed 0.19")):
            stages = json.loads((run / "summary.json").read_text())["stages"]
            for stage in STAGES:
                assert stages[stage]["engines"]["training"].startswith(name)
            assert stages["ppo"]["engines"]["rollout"].startswith("transformers ")
        assert stages["sft"]["engines"]["training"].endswith("ZeRO-3, 2 processes")


class TestDeath:
    """PPO in two processes, more iterations than it will ever see the end of."""

    def start(self, one: Path, params: Path, folder: Path, *, timeout_minutes: float) -> subprocess.Popen[str]:
        endless = [*SHARDED, "ppo.training.zero_stage=2", "ppo.num_iterations=100000"]
        settings = settings_of_stage(
            load_params(params, [*endless, f"ppo.training.timeout_minutes={timeout_minutes}"]), "ppo"
        )
        inputs = {
            "--sft-model": output(one, "sft"),
            "--reward-model": output(one, "reward-model"),
            "--prompts": output(one, "prepare-data", "prompts"),
            "--model": folder / "model",
            "--metrics": folder / "metrics",
            "--curves": folder / "curves",
        }
        options = [str(part) for option in inputs.items() for part in option]
        return subprocess.Popen(
            [sys.executable, "-m", "components.ppo", "--settings", settings, *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def ranks(self, launcher: subprocess.Popen[str]) -> dict[int, int]:
        """The process id of each rank, once the first iteration has been reported."""
        assert launcher.stderr
        said = ""
        for line in launcher.stderr:
            said += line
            if "iteration 1/" in line:
                break
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while it is looked at
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == launcher.pid:
                    environment = dict(
                        e.split("=", 1) for e in (folder / "environ").read_text().split("\0") if "=" in e
                    )
                    found[int(environment["RANK"])] = int(folder.name)
        assert sorted(found) == [0, 1], said
        return found

    def living(self, processes: Iterable[int]) -> list[int]:
        found = []
        for process in processes:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(process)
        return found

    def test_a_killed_process_ends_the_stage_and_is_named(self, one: Path, params: Path, tmp_path: Path) -> None:
        launcher = self.start(one, params, tmp_path, timeout_minutes=10)
        ranks = self.ranks(launcher)
        os.kill(ranks[1], signal.SIGKILL)
        _, said = launcher.communicate(timeout=120)
        assert launcher.returncode == 1
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert errors == ["error: rank 1 of 2 was killed by SIGKILL; the machine may have run out of memory."]
        assert self.living(ranks.values()) == []
        assert list(tmp_path.iterdir()) == []

    def test_a_hung_process_ends_the_stage_by_the_time_out(self, one: Path, params: Path, tmp_path: Path) -> None:
        launcher = self.start(one, params, tmp_path, timeout_minutes=1)
        ranks = self.ranks(launcher)
        os.kill(ranks[1], signal.SIGSTOP)
        _, said = launcher.communicate(timeout=300)
        assert launcher.returncode == 1
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert error.startswith("error: rank 0 of 2: PPO iteration ")
        assert "took longer than 1 minutes" in error
        assert self.living(ranks.values()) == []

    def test_the_launcher_takes_the_others_with_it(self, one: Path, params: Path, tmp_path: Path) -> None:
        launcher = self.start(one, params, tmp_path, timeout_minutes=10)
        ranks = self.ranks(launcher)
        launcher.kill()
        launcher.wait(timeout=60)
        deadline = time.monotonic() + 30
        while self.living(ranks.values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert self.living(ranks.values()) == []
