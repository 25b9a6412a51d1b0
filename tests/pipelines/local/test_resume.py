"""The command line: a run that is killed at any point resumes, with the same result as an undisturbed run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.rlhf.artifacts.manifest import read_manifest
from tests.pipelines.local.test_whole_run import STAGES, output, run_pipeline, summary_of
from tests.support.resident import Resident, ResidentProcess
from tests.support.seaweed import BUCKET, SeaweedFS, bare_client, credentials
from tests.support.toy_pipeline import toy_params, write_data, write_params


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The params file of a run that saves a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("resume")
    often = {"checkpoint": {"every_minutes": 0}}
    params = toy_params(tiny_model, write_data(folder), **often)
    params["ppo"]["num_iterations"] = 8
    return write_params(folder / "toy.yaml", params)


@pytest.fixture(scope="module")
def whole(toy: Path, resident: Resident, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = resident.run([sys.executable, "-m", "pipelines", "run", str(toy), "--out", str(run)], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return run


def resume(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", "run", "--resume", str(run), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def resume_in_resident(resident: Resident, run: Path) -> subprocess.CompletedProcess[str]:
    return resident.run([sys.executable, "-m", "pipelines", "run", "--resume", str(run)], timeout=600)


def start_and_signal(params: Path, run: Path, *, when: str, number: signal.Signals) -> str:
    """Start a run, signal its program as soon as a file is there, and return everything that it printed."""
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(run)]
    # A shell makes a job in the background ignore SIGINT, and so do the processes that it starts, unless one has a handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_file(process, run, when)
    process.send_signal(number)
    return process.communicate(timeout=120)[0]


def wait_for_file(process: subprocess.Popen[str] | ResidentProcess, run: Path, pattern: str) -> None:
    while not any(run.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.01)


def weights_of(run: Path) -> dict[str, str]:
    return {
        stage: read_manifest(output(run, stage, "model")).files["model.safetensors"].sha256
        for stage in ("sft", "reward-model", "ppo")
    }


@pytest.mark.slow
def test_killed_run_resumes_and_produces_identical_models(
    toy: Path, whole: Path, tmp_path: Path, resident: Resident
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipelines", "run", str(toy), "--out", str(run)]
    with (tmp_path / "first").open("w") as log:
        first = resident.popen(command, stdout=log, stderr=log)
        wait_for_file(first, run, "checkpoints/run-*/ppo/*/step-*/.complete")
        first.kill()
    assert first.wait(timeout=30) == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    seconds = {path.stem: json.loads(path.read_text())["record"]["seconds"] for path in run.glob("finished/*.json")}
    finished = set(seconds)
    assert finished >= {"import_model", "prepare_data", "sft", "reward_model"}  # judge may come before ppo or after it

    second = resume(run)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "[sft] finished earlier, verified" in second.stdout
    assert "[ppo] resuming after iteration" in second.stdout
    assert weights_of(run) == weights_of(whole)
    summary = summary_of(run)
    assert sorted(summary["stages"]) == sorted(STAGES)
    assert {name for name, stage in summary["stages"].items() if stage["reused"]} == finished
    for name, stage in summary["stages"].items():
        assert stage["status"] == "succeeded"
        assert (
            stage["seconds"] == pytest.approx(seconds[name], abs=0.05) if name in finished else stage["seconds"] > 0.5
        )

    third = resume_in_resident(resident, run)  # every stage is reused
    assert third.returncode == 0, third.stdout + third.stderr
    # Notifications are sent at every end of the run.
    assert {name for name, stage in summary_of(run)["stages"].items() if not stage["reused"]} == {"notify"}

    weights = output(run, "sft", "model") / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fourth = resume_in_resident(resident, run)
    assert f"[sft] runs again: {weights} was modified" in fourth.stdout
    assert weights_of(run) == weights_of(whole)
    assert {name for name, stage in summary_of(run)["stages"].items() if not stage["reused"]} == {"sft", "notify"}


LAUNCHER = """
import os, signal, subprocess, sys
stage = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # like KFP's launcher: it exits without forwarding the signal
sys.exit(stage.wait())
"""
CONTAINER = ["unshare", "--pid", "--uts", "--mount-proc", "--fork", "--kill-child=SIGTERM", "sh", "-c"]


@pytest.mark.slow
def test_stage_of_a_lost_pod_resumes_elsewhere_from_s3(toy: Path, whole: Path, tmp_path: Path) -> None:
    """The signal ends KFP's launcher and with it the container, so that the stage never receives it."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode != 0:
        pytest.skip("NOT TESTED: the death of a launcher; only root may make a namespace of processes")
    server = SeaweedFS(tmp_path / "server")
    try:
        server.start()
        settings = [sys.executable, "-m", "pipelines", "dev", "settings", "ppo", str(toy)]
        storage = {"checkpoint_uri": f"s3://{BUCKET}/checkpoints", "endpoint_url": server.url, "region": "us-east-1"}
        command = [
            sys.executable, "-m", "components.ppo",
            "--settings", subprocess.run(settings, capture_output=True, text=True, check=True).stdout,
            "--storage", json.dumps(storage),
            "--sft-model", str(output(whole, "sft", "model")),
            "--reward-model", str(output(whole, "reward-model", "model")),
            "--prompts", str(output(whole, "prepare-data", "prompts")),
            "--model", str(tmp_path / "model"),
            "--manifest", str(tmp_path / "manifest"),
            "--metrics", str(tmp_path / "metrics"),
            "--curves", str(tmp_path / "curves"),
        ]  # fmt: skip

        client = bare_client(server.url)

        def saved() -> list[str]:
            found = client.list_objects_v2(Bucket=BUCKET, Prefix="checkpoints/").get("Contents", [])
            return [item["Key"] for item in found if re.search(r"/step-[^/]*/\.complete$", item["Key"])]

        def in_pod(name: str) -> subprocess.Popen[str]:
            launcher = [sys.executable, "-c", LAUNCHER, *command]
            return subprocess.Popen(
                [*CONTAINER, f'hostname {name} && exec "$@"', "sh", *launcher],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | credentials(),
            )  # fmt: skip

        pod = in_pod("ppo-1")
        while not saved():
            assert pod.poll() is None, pod.communicate()[0]
            time.sleep(0.02)
        (launcher,) = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()
        os.kill(int(launcher), signal.SIGTERM)
        said = pod.communicate(timeout=30)[0]
        assert "SIGTERM" not in said  # the stage did not receive it
        assert not (tmp_path / "model").exists()

        again = in_pod("ppo-2")
        said = again.communicate(timeout=300)[0]
        assert again.returncode == 0, said
        assert "on ppo-1 sent no heartbeat; taking over its checkpoints" in said
        assert re.search(r"resuming after iteration [1-7]\b", said)
        digest = read_manifest(tmp_path / "model").files["model.safetensors"].sha256
        assert digest == weights_of(whole)["ppo"]
        assert saved() == []
    finally:
        server.kill()


def test_interrupted_run_prints_the_resume_command(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = start_and_signal(toy, run, when="logs/import_model.log", number=signal.SIGINT)
    assert f"resume with: python -m pipelines run --resume {run}" in said
    assert summary_of(run)["reason"] == "interrupted"


@pytest.mark.parametrize("arguments", [["--set", "seed=1"], ["--out", "elsewhere"], ["pipelines/params/tiny.yaml"]])
def test_resume_accepts_no_other_parameters(tmp_path: Path, arguments: list[str]) -> None:
    result = resume(tmp_path, *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: --resume uses the parameters in the run directory")
    assert result.stderr.count("\n") == 1


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = resume(tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path} contains no run" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_second_process_in_a_run_directory_is_refused(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipelines", "run", str(toy), "--out", str(run)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (run / "run.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = resume(run)
        assert second.returncode == 1
        assert f"Another process uses {run}" in second.stderr
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGKILL)
        first.communicate()


def test_new_run_in_a_used_run_directory_is_refused(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    result = run_pipeline(toy, run)
    assert result.returncode == 1
    assert "resume it with --resume" in result.stderr
    broken = resume(run)
    assert broken.returncode == 1
    assert broken.stderr.count("\n") == 1
