"""A small fault campaign."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.campaign import KINDS

TIMES = 4


@pytest.mark.slow
def test_small_campaign_produces_identical_models(tmp_path: Path) -> None:
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
        "--forks",
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


def test_report_covers_every_fault_and_the_latest_results_are_equal() -> None:
    report = (Path(__file__).parent / "REPORT.md").read_text()
    rows = re.findall(r"^\| (\w+) \| .* \| (\d+) \| (\d+) \| (\d+) \| \d+ \|$", report, re.MULTILINE)
    last = {kind: counts for kind, *counts in rows}
    assert set(last) == set(KINDS)
    assert all(int(times) and times == went_on == equal for times, went_on, equal in last.values())
    lines = re.findall(r"^`kills=(\d+) resumed=(\d+) equal=(\d+) .* hangs=0 orphans=0`$", report, re.MULTILINE)
    for column in range(3):
        assert sum(int(line[column]) for line in lines) == sum(int(counts[column]) for _, *counts in rows)
