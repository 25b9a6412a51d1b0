"""The campaign at a small size."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TIMES = 4


@pytest.mark.slow
def test_a_small_campaign_ends_with_equal_models(tmp_path: Path) -> None:
    report = tmp_path / "REPORT.md"
    command = [
        sys.executable,
        "-m",
        "tests.faults",
        "--kills",
        str(TIMES),
        "--seed",
        "1",
        "--jobs",
        "2",
        "--report",
        str(report),
    ]
    for kind in ("saving", "s3", "mlflow", "disk"):
        command += ["--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    expected = rf"kills={TIMES} resumed={TIMES} equal={TIMES} lost_steps=\d+ hangs=0 orphans=0"
    assert re.fullmatch(expected, last), done.stdout
    assert last in report.read_text()
