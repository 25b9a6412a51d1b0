"""Linux process settings of a stage."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # sys/prctl.h of Linux
DIE_WITH_PARENT = "RLHF_DIE_WITH_PARENT"


def die_with_parent() -> None:
    """On Linux, arrange to be killed when the process whose id is in RLHF_DIE_WITH_PARENT (the local runner) dies."""
    parent = os.environ.get(DIE_WITH_PARENT)
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        # The parent died before prctl(), which covers later deaths only.
        os.kill(os.getpid(), signal.SIGKILL)
