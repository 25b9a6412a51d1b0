"""The revision of the running code."""

import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path

REVISION_VARIABLE = "RLHF_CODE_REVISION"


@functools.cache
def code_revision() -> str:
    """RLHF_CODE_REVISION (set in images), else the git commit, with +dirty for uncommitted changes, else the package version."""
    if os.environ.get(REVISION_VARIABLE):
        return os.environ[REVISION_VARIABLE]
    try:
        return _git("rev-parse", "HEAD") + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("kfp-rlhf")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[3]
    return subprocess.check_output(["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True).strip()
