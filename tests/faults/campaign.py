"""One disturbed run: the faults and their timing, the resumption, and the counts."""

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
from tests.faults.places import Curves, FolderPlace, Services, SmallDisk, curves_of
from tests.support.resident import Resident
from tests.support.tiny_model import make_tiny_model
from tests.support.toy_pipeline import toy_params, write_data, write_params

IN_A_FOLDER = {
    "stage": "the running stage is killed",
    "runner": "the program that runs the pipeline is killed",
    "all": "everything is killed at once",
    "saving": "the stage is killed while a checkpoint is written",
    "writing": "the stage is killed while it writes its model",
    "checkpoint": "the stage is killed, and one byte of its latest checkpoint changes",
    "artifact": "the stage is killed, and one byte of a finished artifact changes",
    "beside": "a second process resumes the run while the first one works, which is then killed",
}
WITH_SERVICES = {
    "uploading": "the stage is killed while a checkpoint is uploaded to S3",
    "s3": "the S3 server with the checkpoints is unreachable for 2 to 20 seconds",
    "mlflow": "the MLflow server is unreachable for 2 to 20 seconds",
}
ON_A_SMALL_DISK = {"disk": "the disk is full until the run ends"}
KINDS = IN_A_FOLDER | WITH_SERVICES | ON_A_SMALL_DISK
HANG_SECONDS = 600.0
Outcome = tuple[str, dict[str, int]]  # kind, and counts
MODELS = ("sft", "reward-model", "ppo")


@dataclass(frozen=True)
class Undisturbed:
    params: Path
    seconds: float
    models: dict[str, str]  # stage -> sha256 of its weights
    curves: Curves


def prepare(folder: Path, resident: Resident | None) -> Undisturbed:
    """Run the small pipeline without a fault."""
    model = make_tiny_model(folder / "model", seed=0)
    params = toy_params(model, write_data(folder), checkpoint={"every_minutes": 0})
    for stage in ("sft", "reward_model"):
        params[stage] |= {"num_epochs": 5, "max_steps": 10}
    params["ppo"]["num_iterations"] = 8
    run = folder / "whole"
    started = time.monotonic()
    place = FolderPlace(folder, write_params(folder / "tracked.yaml", params), resident)
    with (folder / "whole.log").open("w") as log:
        code = place.start(_start(place.params, run), log).wait(timeout=HANG_SECONDS)
    if code:
        raise RuntimeError(f"The undisturbed run ended with {code}: {(folder / 'whole.log').read_text()}")
    seconds = time.monotonic() - started
    path = write_params(folder / "toy.yaml", params | {"tracking": {"enabled": False}})
    return Undisturbed(path, seconds, models_of(run), curves_of(f"sqlite:///{run}/mlflow.db", run.name))


def disturb(
    whole: Undisturbed, place: FolderPlace, run: Path, draws: random.Random, *, kills: int, kinds: tuple[str, ...]
) -> list[Outcome]:
    """Start a run, disturb and resume it until it ends or no kills are left; return (kind, counts) of each fault."""
    done: list[Outcome] = []
    tracebacks = 0
    command = _start(place.params_of(run), run)
    while True:
        last = len(done) >= kills
        kind = draws.choice(kinds)
        attempt = _Attempt(command, place, run)
        steps_before = trained_steps(place, run)
        delay, length = draws.uniform(0.5, 0.3 * whole.seconds), draws.uniform(2, 20)
        disturbed = False if last else attempt.disturb(kind, delay, length)
        code, hung = attempt.wait()
        orphans = attempt.orphans()
        if done:
            done[-1][1]["lost_steps"] += steps_before - attempt.resumed_from(steps_before)
            done[-1][1]["resumed"] += not hung
        if disturbed:
            if kind == "beside" and not attempt.refused:
                raise RuntimeError(f"two processes worked in {run}")
            if "Traceback" in attempt.said:  # an error message is guaranteed
                print(f"after {kind} the run {run} ends with a traceback:\n{attempt.said}", flush=True)
                tracebacks += 1
            done.append(
                (kind, {"kills": 1, "resumed": 0, "equal": 0, "lost_steps": 0, "hangs": int(hung), "orphans": orphans})
            )
            _damage(kind, run, draws)
            begun = (run / "run.json").exists()
            command = _resume(run) if begun else _start(place.params_of(run), run)
            continue
        if code != 0:
            print(f"the run {run} ends with {code}:\n{attempt.said}", flush=True)
        equal = code == 0 and models_of(run) == whole.models
        if equal and place.curves(run) not in (None, whole.curves):
            print(f"the run {run} has the same models and other curves", flush=True)
            equal = False
        for _, counts in done:
            counts["equal"] = int(equal and not tracebacks)
        return done


class _Attempt:
    """One process that executes a run until it is killed or ends."""

    def __init__(self, command: list[str], place: FolderPlace, run: Path) -> None:
        self.place, self.run, self.refused, self.said = place, run, False, ""
        self.log = (run.parent / f"{run.name}.log").open("w+")
        self.process = place.start(command, self.log)

    def disturb(self, kind: str, delay: float, length: float) -> bool:
        """Cause the fault after a delay, or then as soon as its condition holds; False if the run ended before."""
        if not self._runs_for(delay):
            return False
        if isinstance(self.place, SmallDisk):
            with self.place.full():
                self._runs_for(60)
            return True
        if isinstance(self.place, Services):
            if kind != "uploading":
                with self.place.away(kind):
                    self._runs_for(length)
                return True
            self.place.catch_upload = True
        return self._kill(kind)

    def _kill(self, kind: str) -> bool:
        watched: dict[str, Callable[[], bool]] = {
            "saving": self._saving, "writing": self._writing, "uploading": self._uploading
        }  # fmt: skip
        seen = watched.get(kind, lambda: True)
        while not seen() or (kind != "runner" and not self.stages()):
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        if kind == "beside":
            second = subprocess.run(_resume(self.run), capture_output=True, text=True, timeout=120)
            self.refused = second.returncode == 1 and "Another process uses" in second.stderr
        victims = [] if kind == "runner" else self.stages()
        if kind in ("runner", "all", "beside"):
            victims.append(self.process.pid)
        if self.process.poll() is not None or not victims:
            return False
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def _runs_for(self, seconds: float) -> bool:
        """Wait; return False as soon as the process has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        return True

    def wait(self) -> tuple[int, bool]:
        """The exit code, and whether the process hung and had to be killed."""
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
        """Number of processes of this run that are still alive after 5 seconds."""
        deadline = time.monotonic() + 5
        while (left := len(self.stages())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def stages(self) -> list[int]:
        """Process ids of this run's stages."""
        return [
            pid
            for pid, text in _commands()
            if f"{self.run}/" in text and "components." in text and pid != self.process.pid
        ]

    def resumed_from(self, before: int) -> int:
        """The step that the stage resumed from: `before` if no checkpoint was needed, 0 if all checkpoints were skipped."""
        found = re.search(r"resuming after (?:step|iteration) (\d+)", self.said)
        return min(before, int(found[1])) if found else (0 if "is skipped" in self.said else before)

    def _saving(self) -> bool:
        return any(not (step / ".complete").exists() for step in self.run.glob("checkpoints/run-*/*/*/step-*"))

    def _uploading(self) -> bool:
        assert isinstance(self.place, Services)
        return not self.place.catch_upload

    def _writing(self) -> bool:
        return any(self.run.glob("artifacts/*/*/.model.writing-*"))


def trained_steps(place: FolderPlace, run: Path) -> int:
    """The latest step of the running stage for which a checkpoint was started; 0 if there is none."""
    return max((int(name.split("-")[1]) for name in place.steps(run)), default=0)


def models_of(run: Path) -> dict[str, str]:
    found = {}
    for stage in MODELS:
        (folder,) = (run / "artifacts").glob(f"*/{stage}/model")
        found[stage] = read_manifest(folder).files["model.safetensors"].sha256
    return found


def _damage(kind: str, run: Path, draws: random.Random) -> None:
    """Change one byte of a file, like a disk error."""
    if kind == "checkpoint":
        files = [
            path
            for step in sorted(run.glob("checkpoints/run-*/*/*/step-*"))[-1:]
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
