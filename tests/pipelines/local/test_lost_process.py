"""PPO in two processes when one of them, or the program that launched them, is killed or hangs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pipelines.settings import load_params, settings_of_stage
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params

pytestmark = pytest.mark.deepspeed
ENDLESS = (
    "ppo.training.engine=deepspeed", "ppo.training.zero_stage=2", "ppo.training.num_processes=2", "ppo.num_iterations=100000",
)  # fmt: skip


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    params = toy_params(tiny_model, write_data(folder))
    params["model"]["num_frozen_layers"] = 0  # ZeRO cannot share frozen layers between models
    return write_params(folder / "toy.yaml", params)


@pytest.fixture(scope="module")
def inputs(resident: Resident, params: Path) -> list[str]:
    """Options that name the inputs of PPO, from a finished run."""
    run = params.parent / "run"
    done = resident.run([sys.executable, "-m", "pipelines", "run", str(params), "--out", str(run)], timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = {
        "--sft-model": "sft/model", "--reward-model": "reward-model/model", "--prompts": "prepare-data/prompts",
    }  # fmt: skip
    return [part for option, path in outputs.items() for part in (option, str(run / "artifacts" / "rlhf" / path))]


def start(inputs: list[str], params: Path, folder: Path, *, timeout_minutes: float) -> subprocess.Popen[str]:
    """Start PPO with more iterations than it will complete."""
    settings = settings_of_stage(
        load_params(params, [*ENDLESS, f"ppo.training.timeout_minutes={timeout_minutes}"]), "ppo"
    )
    outputs = [
        part for name in ("model", "manifest", "metrics", "curves") for part in (f"--{name}", str(folder / name))
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "components.ppo", "--settings", settings, *inputs, *outputs],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """The process id of each rank, once the first iteration has been reported."""
    assert launcher.stderr
    said = ""
    for line in launcher.stderr:
        said += line
        if "iteration 1/" in line:
            break
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end at any time
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                environment = dict(e.split("=", 1) for e in (folder / "environ").read_text().split("\0") if "=" in e)
                found[int(environment["RANK"])] = int(folder.name)
    assert sorted(found) == [0, 1], said
    return found


def living(processes: Iterable[int]) -> list[int]:
    found = []
    for process in processes:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(process)
    return found


@pytest.fixture(scope="module")
def stopped(
    inputs: list[str], params: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], dict[int, int]]]:
    """A launcher whose rank 1 has been stopped; the minute of its time-out passes while other tests run."""
    launcher = start(inputs, params, tmp_path_factory.mktemp("hung"), timeout_minutes=1)
    ranks = ranks_of(launcher)
    os.kill(ranks[1], signal.SIGSTOP)
    yield launcher, ranks
    launcher.kill()
    launcher.communicate()


@pytest.mark.usefixtures("stopped")
def test_killed_rank_ends_the_stage_and_is_named(inputs: list[str], params: Path, tmp_path: Path) -> None:
    launcher = start(inputs, params, tmp_path, timeout_minutes=10)
    ranks = ranks_of(launcher)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1 of 2 was killed by SIGKILL; the machine may have run out of memory."]
    assert living(ranks.values()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("stopped")
def test_no_process_outlives_the_launcher(inputs: list[str], params: Path, tmp_path: Path) -> None:
    launcher = start(inputs, params, tmp_path, timeout_minutes=10)
    ranks = ranks_of(launcher)
    launcher.kill()
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 30
    while living(ranks.values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert living(ranks.values()) == []


def test_hung_rank_ends_the_stage_after_the_timeout(stopped: tuple[subprocess.Popen[str], dict[int, int]]) -> None:
    launcher, ranks = stopped
    _, said = launcher.communicate(timeout=300)
    assert launcher.returncode == 1
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rank 0 of 2: PPO iteration ")
    assert "took longer than training.timeout_minutes (1 minutes)" in error
    assert living(ranks.values()) == []
