import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.__main__ import cli
from pipelines.local import doctor

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
