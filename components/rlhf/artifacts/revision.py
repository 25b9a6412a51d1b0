"""Which version of this code is running."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path


@functools.cache
def code_revision() -> str:
    """The git commit, with +dirty when files differ from it; the package's version where there is no repository."""
    root = Path(__file__).resolve().parents[3]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        return head.stdout.strip() + ("+dirty" if status.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("kfp-rlhf")
