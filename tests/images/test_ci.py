"""CI for images: a missing podman is reported twice, and only failing tests make it fail."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = "SKIPPED [12] NO IMAGE WAS BUILT OR RUN: podman not installed"


@pytest.mark.parametrize(
    ("user", "apt_get", "made", "code", "sentences"),
    [
        ("1000", "exit 0", f"echo '{SKIPPED}'", 0, ["only root can install it with apt-get", "!!! NO IMAGE WAS BUILT"]),
        (
            "0",
            "echo E: no network; exit 100",
            f"echo '{SKIPPED}'",
            0,
            ["E: no network", "podman could not be installed"],
        ),
        ("0", "exit 0", "echo 1 failed; exit 2", 2, ["1 failed"]),
        ("0", "exit 0", "echo 12 passed", 0, ["12 passed"]),
    ],
)
def test_ci_reports_when_podman_is_missing(
    user: str, apt_get: str, made: str, code: int, sentences: list[str], tmp_path: Path
) -> None:
    for program in ("bash", "cat", "dirname", "env", "grep", "mktemp", "rm", "tail", "tee"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    for name, line in (("id", f"echo {user}"), ("apt-get", apt_get), ("make", made)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run([ROOT / ".ci" / "images"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert all(sentence in done.stdout for sentence in sentences), done.stdout + done.stderr
    assert ("!!!" in done.stdout) == ("NO IMAGE" in made)
