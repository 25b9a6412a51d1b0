"""Runs a stage program and reads the largest resident set of each of its processes from the kernel."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from components.rlhf.config.base import BaseConfig

POLL_SECONDS = 0.05
READS = {
    "sft": ("base_model", "demonstrations"),
    "reward_model": ("base_model", "sft_model", "preferences", "prompts"),
    "ppo": ("sft_model", "reward_model", "prompts"),
    "dpo": ("sft_model", "preferences"),
    "evaluation": ("sft_model", "policy", "reward_model", "judge", "prompts"),
}
WRITES = {
    "sft": ("model", "metrics", "summary"),
    "reward_model": ("model", "metrics", "summary"),
    "ppo": ("model", "manifest", "metrics", "curves"),
    "dpo": ("model", "manifest", "metrics", "report"),
    "evaluation": ("evaluation", "metrics", "report", "summary", "decision", "reason", "better"),
}


@dataclass
class Measured:
    """Peaks in bytes by rank, and the output of the program."""

    peaks: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    output: str = ""


def run_stage(stage: str, config: BaseConfig, inputs: Path, folder: Path, *, checkpoints: bool) -> Measured:
    """Run one stage program on the inputs; raises RuntimeError with the end of its output if it fails."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", f"components.{stage}", "--settings", config.canonical_json()]
    command += ["--tracking", '{"enabled": false}']
    if checkpoints:
        command += ["--storage", f'{{"checkpoint_uri": "{folder / "checkpoints"}"}}']
    for name in READS[stage]:
        command += [f"--{name.replace('_', '-')}", str(inputs / name)]
    for name in WRITES[stage]:
        command += [f"--{name}", str(folder / name)]
    log = folder / "log"
    started, measured = time.monotonic(), Measured()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None:
            for pid in _tree(process.pid):
                rank, peak = _rank(pid), _peak(pid)
                if rank is not None:
                    measured.peaks[rank] = max(measured.peaks.get(rank, 0), peak)
            time.sleep(POLL_SECONDS)
    measured.seconds, measured.output = time.monotonic() - started, log.read_text(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{stage} failed:\n{measured.output[-3000:]}")
    if len(measured.peaks) > 1:
        measured.peaks.pop(-1, None)  # the launcher, which is no rank
    return measured


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for number in found:
        try:
            for task in Path(f"/proc/{number}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def _rank(pid: int) -> int | None:
    """The rank of a process, -1 for one that is not launched by torchrun, and None for a program that is no stage."""
    try:
        if b"components." not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None
        variables = dict(
            pair.partition(b"=")[::2] for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if pair
        )
    except OSError:
        return None
    return int(variables.get(b"RANK", b"-1"))


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
