import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.__main__ import cli
from pipelines.local import doctor
from tests.support.kfp_api import HttpError, KfpApi, serving

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6\n"


def torch_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, probe: str, driver: str | None, code: int = 0
) -> doctor.Check:
    done = subprocess.CompletedProcess([], code, probe, "ImportError: no torch\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr("components.rlhf.runtime.accelerators.DRIVER_VERSION", tmp_path / "version")
    if driver:
        (tmp_path / "version").write_text(driver)
    return next(check for check in doctor.checks(tmp_path) if check.name == "torch")


@pytest.mark.parametrize(
    ("gpus", "cuda", "driver", "status", "text"),
    [
        (0, "", None, "ok", "2.13.0, CPU only"),
        (8, "13.0", CLOSED, "ok", "2.13.0, 8 GPUs"),
        (0, "13.0", CLOSED, "problem", "CUDA 13.0 needs the NVIDIA driver R580 or newer, and this one is 535.54.03"),
        (0, "12.8", CLOSED, "note", "look at nvidia-smi"),
        (0, "", CLOSED, "note", "this torch has no CUDA"),
    ],
)
def test_driver_that_torch_cannot_use_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, cuda: str, driver: str | None, status: str, text: str
) -> None:
    probe = f'some warning\n{{"torch": "2.13.0", "cuda": "{cuda}", "gpus": {gpus}}}\n'
    check = torch_check(monkeypatch, tmp_path, probe, driver)
    assert check.status == status and text in check.text


def test_broken_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = torch_check(monkeypatch, tmp_path, "", None, code=1)
    assert (check.status, check.text) == ("problem", "cannot be imported (ImportError: no torch); run make setup")


def test_command_shows_a_line_per_part(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli, ["doctor"])
    lines = result.output.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "note"} and result.exit_code == 0
    assert {line.split()[1] for line in lines} >= {"kfp-rlhf", "torch", "disk", "memory", "kubectl"}
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**60)
    assert CliRunner().invoke(cli, ["doctor"]).exit_code == 1


@pytest.fixture
def nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks that need torch take seconds."""
    monkeypatch.setattr(doctor, "checks", lambda folder: [])


def lines_of(*arguments: str) -> dict[str, tuple[str, str]]:
    """Status and text of each check."""
    found = json.loads(CliRunner().invoke(cli, ["doctor", "--json", *arguments]).output)
    return {check["name"]: (check["status"], check["text"]) for check in found}


class MlflowHealth:
    """Answers like an MLflow server, or one that wants a password, or none at all."""

    def __init__(self, status: int) -> None:
        self.status = status

    def handle(self, method: str, url: str, headers: object, body: bytes) -> bytes:
        assert url == "/health"
        if self.status != 200:
            raise HttpError(self.status, "")
        return b"OK"


@pytest.mark.parametrize(("answer", "status"), [(200, "ok"), (401, "ok"), (404, "problem"), (None, "problem")])
@pytest.mark.usefixtures("nothing_of_this_machine")
def test_tracking_server_of_a_params_file_is_asked(answer: int | None, status: str) -> None:
    with serving(MlflowHealth(answer or 200)) as address:
        uri = address if answer else "http://127.0.0.1:9"
        found = lines_of("pipelines/params/tiny.yaml", "--set", f"tracking.uri={uri}")
    assert found["inputs"][0] == "ok"
    assert found["MLflow"][0] == status and uri in found["MLflow"][1]


@pytest.mark.usefixtures("nothing_of_this_machine")
def test_missing_data_and_an_unreachable_store_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    settings = ("data.prompts.path=none.jsonl", "data.prompts.format=jsonl", "storage.publish_uri=s3://b/p")
    settings += ("storage.endpoint_url=http://127.0.0.1:9",)
    found = lines_of("pipelines/params/tiny.yaml", *[part for setting in settings for part in ("--set", setting)])
    assert found["inputs"][0] == "problem" and "none.jsonl" in found["inputs"][1]
    assert found["S3"][0] == "problem" and "storage.publish_uri" in found["S3"][1]
    assert "MLflow" not in found and "KFP" not in found


@pytest.mark.usefixtures("nothing_of_this_machine")
def test_kubeflow_pipelines_is_asked() -> None:
    with serving(KfpApi()) as address:
        assert lines_of("--host", address)["KFP"] == ("ok", "version 2.17.0")
    status, text = lines_of("--host", "http://127.0.0.1:9")["KFP"]
    assert status == "problem" and "cannot be reached" in text
