"""The termination message of a container: the sentence that Kubernetes, Argo and Kubeflow Pipelines show for a failed pod.

Argo puts it behind "main: Error (exit code 1): " (workflow/controller/operator.go of Argo 4.0, inferFailedReason). Without it, a user
of the Kubeflow Pipelines UI sees only the exit code, because KFP's launcher exits with 1 whatever the stage's own code was.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from components.rlhf.text.errors import InputError, RetryableError
from components.rlhf.text.redaction import redact

TERMINATION_LOG = Path("/dev/termination-log")  # Kubernetes mounts this file, writable by all users
MAX_BYTES = 4096  # the kubelet ignores the rest
FINAL_PREFIX = "error: "  # of an error that will occur again; manifests/argo-retries.yaml does not retry it
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where a process says why it fails, for the launcher that has started it


def write_termination_message(error: BaseException | str, *, replace: bool = False) -> None:
    """Write why this container fails, unless a process of it has already said so. Does nothing outside of Kubernetes.

    With replace, this is the reason for what such a process has said.
    """
    with contextlib.suppress(OSError):  # the log of the container has the error as well
        if TERMINATION_LOG.is_file() and (replace or TERMINATION_LOG.stat().st_size == 0):
            TERMINATION_LOG.write_bytes(message_of(error).encode()[:MAX_BYTES])


def tell_launcher(error: BaseException) -> None:
    """Tell the launcher of several processes, if there is one, why this process fails; it tells the other nodes."""
    if path := os.environ.get(ERROR_FILE):
        content = {"message": message_of(error)[:MAX_BYTES], "timestamp": int(time.time())}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")


def message_of(error: BaseException | str) -> str:
    """One line; it starts with "error: " if another attempt would fail as well."""
    if isinstance(error, InputError) and not isinstance(error, RetryableError):
        text = f"{FINAL_PREFIX}{error}"
    elif isinstance(error, InputError | str):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return redact(" ".join(text.split()))
