"""What a stage asks of the C library and the kernel for its own process."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # sys/prctl.h of Linux
DIE_WITH_PARENT = "RLHF_DIE_WITH_PARENT"


def die_with_parent() -> None:
    """On Linux, and where the runner of a laptop asks for it by its process id, be killed when the runner is: no stage is left behind."""
    parent = os.environ.get(DIE_WITH_PARENT)
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        # It died while this process was starting, and the kernel tells of later deaths only.
        os.kill(os.getpid(), signal.SIGKILL)
