"""Which version of this code is running."""

import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path

REVISION = "RLHF_CODE_REVISION"


@functools.cache
def code_revision() -> str:
    """RLHF_CODE_REVISION (images set it), else the git commit, with +dirty when files differ from it, else the package's version."""
    if os.environ.get(REVISION):
        return os.environ[REVISION]
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
