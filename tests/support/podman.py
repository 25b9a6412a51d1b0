"""Images that podman builds and runs on a Debian base made here, without a registry."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from components.rlhf.storage.pypi import cache_folder

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/kfp-rlhf-base:bookworm"
PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
MIRROR = "http://deb.debian.org/debian"
# Runtimes and limits that work where crun, or raising limits, is not allowed.
NO_NETWORK = re.compile(
    r"name resolution|Could not resolve|dns error|Network is unreachable|Connection refused|Could not connect|[Cc]onnection timed out"
    r"|error sending request|Failed to establish a new connection|Connection broken|Failed to fetch"
)
SETTINGS = '[engine]\nruntime = "runc"\n[containers]\ndefault_ulimits = ["nofile=8192:8192", "nproc=8192:8192"]\n'


def missing() -> str:
    """Why no image can be built here; empty if it can."""
    absent = [program for program in ("podman", "runc", "mmdebstrap") if not shutil.which(program)]
    if absent and not (absent == ["mmdebstrap"] and base_file().is_file()):
        return (
            f"{', '.join(absent)} not installed: apt-get install --no-install-recommends podman buildah runc mmdebstrap"
        )
    if os.geteuid() != 0:
        return "making a Debian base and running podman with these settings needs root"
    return ""


def base_file() -> Path:
    return cache_folder() / "images" / "debian-bookworm.tar"


def podman(*arguments: str, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"podman {' '.join(arguments[:3])}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done


def make_base() -> None:
    """A Debian image with Python under the tag BASE; its archive is cached, so that the second time takes seconds."""
    file = base_file()
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}.tar")
        try:
            command = [
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                f"--include={PACKAGES}",
                "bookworm",
                str(draft),
                MIRROR,
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            if done.returncode:
                raise RuntimeError(f"mmdebstrap: {done.stderr[-3000:]}")
            draft.rename(file)
        finally:
            draft.unlink(missing_ok=True)
    if podman("image", "exists", BASE, check=False).returncode:
        podman("import", str(file), BASE)


def build(image: str, tag: str, *arguments: str) -> str:
    """Build a Dockerfile on BASE and return the output of the build; wheels and certificates of this machine are mounted.

    podman reuses a step whose inputs have the same digests as in an earlier build on this machine, where layers are cheap.
    """
    overlay = podman("info", "--format", "{{.Store.GraphDriverName}}").stdout.strip() == "overlay"
    found = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
    ).stdout.strip()
    mounts = ["--build-context", f"wheels={found}"] if found and Path(found).is_dir() else []
    bundle = os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    mounts += ["--secret", f"id=ca,src={bundle}"] if Path(bundle).is_file() else []
    with base_file().with_suffix(".lock").open("w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # a second build of the same image at the same time would find no layer to reuse
        done = _build(image, tag, overlay, [*mounts, *arguments])
    return done.stdout + done.stderr


def _build(image: str, tag: str, overlay: bool, options: list[str]) -> subprocess.CompletedProcess[str]:
    return podman(
        "build", "--network", "host", f"--layers={str(overlay).lower()}", "--force-rm",
        "--file", f"images/{image}/Dockerfile", "--tag", tag,
        "--build-arg", f"BASE={BASE}", *options, str(ROOT), timeout=3000,
    )  # fmt: skip


@contextlib.contextmanager
def podman_service(folder: Path) -> Iterator[str]:
    """Docker's API on a socket in folder, for the length of the block."""
    socket = folder / "podman.sock"
    with (folder / "podman.log").open("w") as log:
        process = subprocess.Popen(["podman", "system", "service", "--time=0", f"unix://{socket}"], stderr=log)
        try:
            deadline = time.monotonic() + 60
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"podman system service did not start: {(folder / 'podman.log').read_text()}")
                time.sleep(0.1)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait(timeout=30)


@contextlib.contextmanager
def true_exit_codes() -> Iterator[list[int]]:
    """Within the block kfp's DockerRunner gets the true exit codes of containers; yields them in order.

    It starts each with auto_remove, and when the container is gone before it can ask for the exit code it takes that for success
    (kfp.local.docker_task_handler.run_docker_container), which with podman is so always. Here containers stay until they
    were asked, and are removed then.
    """
    from docker.models.containers import Container, ContainerCollection

    start, wait = ContainerCollection.run, Container.wait
    codes: list[int] = []

    def run(self: ContainerCollection, *arguments: object, **settings: object) -> object:
        return start(self, *arguments, **{**settings, "auto_remove": False})

    def wait_and_remove(self: Container, **settings: object) -> dict[str, int]:
        try:
            ended: dict[str, int] = wait(self, **settings)
        finally:
            self.remove(force=True)
        codes.append(ended["StatusCode"])
        return ended

    ContainerCollection.run, Container.wait = run, wait_and_remove
    try:
        yield codes
    finally:
        ContainerCollection.run, Container.wait = start, wait
