"""Environments of the peers: one virtual environment for each file of pinned versions, made with uv under .cache/peers."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.record import ROOT

CACHE = ROOT / ".cache" / "peers"
OURS = "ours"
TRL_PPO, TRL_NEWEST = "trl-1.12", "trl-1.16"  # the last TRL with PPO, and the newest one


def python_of(environment: str) -> Path:
    """The interpreter of an environment, which is made first if it does not exist or has other versions."""
    if environment == OURS:
        return Path(sys.executable)
    pins, folder = Path(__file__).with_name(f"{environment}.txt"), CACHE / environment
    python, ready = folder / "bin" / "python", folder / "ready"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if not (python.is_file() and ready.is_file() and ready.read_text() == digest):
        _install(pins, folder, python)
        ready.write_text(digest)
    return python


def _install(pins: Path, folder: Path, python: Path) -> None:
    uv = ROOT / ".venv" / "bin" / "uv"
    program = str(uv) if uv.is_file() else shutil.which("uv")
    if program is None:
        sys.exit("benchmarks.peers needs uv to install TRL; run make setup.")
    lines = pins.read_text().split()
    main = [line for line in lines if line.startswith(("trl=", "torch=", "transformers=", "accelerate="))]
    print(f"installing {', '.join(sorted(main))} and {len(lines) - len(main)} more packages into {folder}", flush=True)
    wheels = _wheel_folder()
    source = ["--find-links", wheels] if wheels else ["--torch-backend=cpu"]
    for command in (
        [program, "venv", "-q", "--clear", "--python", sys.executable, str(folder)],
        [program, "pip", "install", "-q", "--python", str(python), *source, "-r", str(pins)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.split())[:300] or "uv printed no error"
            sys.exit(
                f"The environment {folder.name} could not be installed ({reason}); check the network and run again."
            )


def _wheel_folder() -> str:
    """The folder of wheels with torch that pip is configured with, if there is one; uv does not read pip's setting."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return found[0] if found and list(Path(found[0]).glob("torch-*.whl")) else ""
