"""Measuring several systems in turn, each in processes of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import CACHE, OURS, python_of
from benchmarks.peers.measure import RESULT
from benchmarks.peers.rows import Row, make_row
from benchmarks.record import ROOT


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One system at one setting."""

    system: str
    setting: str
    module: str  # program in benchmarks.peers that measures it
    job: dict[str, Any]  # its argument
    environment: str = OURS
    more: dict[str, Any] = field(default_factory=dict)  # further fields of its row


def measure(name: str, arms: Sequence[Arm], rounds: int) -> Iterator[list[Row]]:
    """Start every arm once per round, one after the other; after each process, give the rows of all arms measured so far."""
    pythons = {arm.environment: python_of(arm.environment) for arm in arms}
    results: list[list[dict[str, Any]]] = [[] for _ in arms]
    for number in range(1, rounds + 1):
        for arm, collected in zip(arms, results, strict=True):
            print(f"{name}, round {number} of {rounds}: {arm.system}; {arm.setting}", flush=True)
            result = _run(name, arm, pythons[arm.environment])
            collected.append(result)
            seconds = ", ".join(f"{cpu:.2f}" for cpu, _ in result["intervals"])
            print(f"  CPU seconds {seconds}; peak {result['peak_bytes'] / 2**30:.2f} GiB", flush=True)
            done = [(each, found) for each, found in zip(arms, results, strict=True) if found]
            yield [make_row(each.system, each.setting, found, **each.more) for each, found in done]


def _run(name: str, arm: Arm, python: Path) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "passive",  # threads that wait must not spin: they would be counted, and disturb others
        "CUDA_VISIBLE_DEVICES": "",  # the comparison is on CPUs
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    load = round(os.getloadavg()[0], 2)
    command = [str(python), "-m", f"benchmarks.peers.{arm.module}", json.dumps(arm.job)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.splitlines()
    found = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    if done.returncode or not found:
        log = CACHE / "failed.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout, encoding="utf-8")
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        sys.exit(f"{name}: {arm.system} failed ({reason:.300}); {log.relative_to(ROOT)} has its output.")
    return json.loads(found[-1]) | {"load": load}
