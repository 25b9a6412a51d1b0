"""One disturbed run: what is killed when, how it goes on, and what is counted."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from components.rlhf.artifacts.manifest import read_manifest
from tests.pipelines.toy import toy_params, write_data, write_params
from tests.tiny import make_tiny_model

KINDS = {
    "stage": "the stage that runs is killed",
    "runner": "the program that runs the pipeline is killed",
    "all": "everything is killed at once",
    "saving": "the stage is killed while a checkpoint is written",
    "writing": "the stage is killed while it writes its model",
    "checkpoint": "the stage is killed, and a byte of its newest checkpoint changes",
    "artifact": "the stage is killed, and a byte of a finished artifact changes",
    "beside": "a second process goes on with the run beside the first, which is then killed",
}
HANG_SECONDS = 600.0
MODELS = ("sft", "reward-model", "ppo")


@dataclass(frozen=True)
class Undisturbed:
    params: Path
    seconds: float
    models: dict[str, str]  # stage -> sha256 of its weights


def prepare(folder: Path) -> Undisturbed:
    """The run that nobody disturbs."""
    model = make_tiny_model(folder / "model", seed=0)
    changes = {"checkpoint": {"every_minutes": 0}, "tracking": {"enabled": False}}
    params = toy_params(model, write_data(folder), **changes)
    for stage in ("sft", "reward_model"):
        params[stage] |= {"num_epochs": 5, "max_steps": 10}
    params["ppo"]["num_iterations"] = 8
    path = write_params(folder / "toy.yaml", params)
    started = time.monotonic()
    subprocess.run(_start(path, folder / "whole"), check=True, capture_output=True)
    return Undisturbed(path, time.monotonic() - started, models_of(folder / "whole"))


def disturb(
    whole: Undisturbed, run: Path, draws: random.Random, *, kills: int, kinds: tuple[str, ...]
) -> list[tuple[str, dict[str, int]]]:
    """Start a run, kill it and go on with it until it ends or kills are spent; (kind, counts) of each kill."""
    done: list[tuple[str, dict[str, int]]] = []
    command = _start(whole.params, run)
    while True:
        last = len(done) >= kills
        kind = draws.choice(kinds)
        attempt = _Attempt(command, run)
        steps_before = trained_steps(run)
        killed = False if last else attempt.kill(kind, draws.uniform(0.5, 0.4 * whole.seconds))
        code, hung = attempt.wait()
        orphans = attempt.orphans()
        if done:
            done[-1][1]["lost_steps"] += steps_before - attempt.resumed_from(steps_before)
            done[-1][1]["resumed"] += not hung
        if killed:
            refused = kind != "beside" or attempt.refused
            done.append(
                (kind, {"kills": 1, "resumed": 0, "equal": 0, "lost_steps": 0, "hangs": hung, "orphans": orphans})
            )
            if not refused:
                raise RuntimeError(f"two processes worked in {run}")
            _damage(kind, run, draws)
            command = _resume(run) if (run / "run.json").exists() else _start(whole.params, run)
            continue
        if code != 0 and not hung:
            raise RuntimeError(f"the run {run} ends with {code}:\n{attempt.said}")
        equal = code == 0 and models_of(run) == whole.models
        for _, counts in done:
            counts["equal"] = int(equal)
        return done


class _Attempt:
    """One process that works on a run, until it is killed or ends."""

    def __init__(self, command: list[str], run: Path) -> None:
        self.run, self.refused, self.said = run, False, ""
        self.log = (run.parent / f"{run.name}.log").open("w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)

    def kill(self, kind: str, delay: float) -> bool:
        """Kill after a delay, or when what the kind waits for is seen after it; False when the run ended before."""
        until = time.monotonic() + delay
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        seen: Callable[[], bool] = {"saving": self._saving, "writing": self._writing}.get(kind, lambda: True)
        while not seen() or (kind != "runner" and not self.stages()):
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        if kind == "beside":
            second = subprocess.run(_resume(self.run), capture_output=True, text=True, timeout=120)
            self.refused = second.returncode == 1 and "Another process works in" in second.stderr
        victims = [] if kind == "runner" else self.stages()
        if kind in ("runner", "all", "beside"):
            victims.append(self.process.pid)
        if self.process.poll() is not None or not victims:
            return False
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def wait(self) -> tuple[int, bool]:
        """Exit code, and whether it had to be ended because it hung."""
        hung = False
        try:
            code = self.process.wait(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            hung, code = True, -1
            self.process.kill()
            self.process.wait()
        self.log.seek(0)
        self.said = self.log.read()
        self.log.close()
        return code, hung

    def orphans(self) -> int:
        """Processes of this run that outlive it by more than the kernel's moment."""
        deadline = time.monotonic() + 5
        while (left := len(self.stages())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def stages(self) -> list[int]:
        """Processes that work on this run, but for the one that was started here."""
        return [
            pid
            for pid, text in _commands()
            if f"{self.run}/" in text and "components." in text and pid != self.process.pid
        ]

    def resumed_from(self, before: int) -> int:
        """The last step that the stage had when it went on; before when it did not say, because it had nothing to go on with."""
        found = re.search(r"resuming after (?:step|iteration) (\d+)", self.said)
        return min(before, int(found[1])) if found else (0 if "passed over" in self.said else before)

    def _saving(self) -> bool:
        return any(not (step / ".complete").exists() for step in self.run.glob("checkpoints/*/*/step-*"))

    def _writing(self) -> bool:
        return any(self.run.glob("artifacts/*/*/.model.writing-*"))


def trained_steps(run: Path) -> int:
    """The newest step of the stage that was at work, as far as a checkpoint of it has been begun; 0 when there is none."""
    steps = [path for path in run.glob("checkpoints/*/*/step-*") if path.is_dir()]
    return max((int(path.name.split("-")[1]) for path in steps), default=0)


def models_of(run: Path) -> dict[str, str]:
    found = {}
    for stage in MODELS:
        (folder,) = (run / "artifacts").glob(f"*/{stage}/model")
        found[stage] = read_manifest(folder).files["model.safetensors"].sha256
    return found


def _damage(kind: str, run: Path, draws: random.Random) -> None:
    """Change one byte of a file, as a bad disk would."""
    if kind == "checkpoint":
        files = [
            path
            for step in sorted(run.glob("checkpoints/*/*/step-*"))[-1:]
            for path in step.rglob("*")
            if path.is_file()
        ]
    elif kind == "artifact":
        files = [
            path for path in sorted(run.glob("artifacts/*/*/*/*")) if path.is_file() and ".writing-" not in str(path)
        ]
    else:
        return
    files = [path for path in files if path.stat().st_size]
    if files:
        path = draws.choice(files)
        data = bytearray(path.read_bytes())
        data[draws.randrange(len(data))] ^= 1
        path.write_bytes(data)


def _commands() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _start(params: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(run)]


def _resume(run: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines", "run", "--resume", str(run)]
