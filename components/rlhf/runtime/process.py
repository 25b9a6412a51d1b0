"""How the process of a stage ends: with its parent, and after success."""

import atexit
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable

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


def end_before_finalization(module: str) -> Callable[[], None]:
    """Once the returned function has been called, end with code 0 after all atexit handlers, if module is the program itself.

    The interpreter is not finalized then: freeing every object of torch and transformers takes half a second, and in a rank of a
    group it may abort the process. If a thread of gloo releases the tensors of the last collective during finalization, Python ends
    the thread, and C++ aborts ("terminate called without an active exception"). Destroying the process group does not join its
    threads where DeepSpeed still refers to it.

    Call this before other modules register atexit handlers, since the first one registered is called last.
    """
    succeeded = False

    def end() -> None:
        if succeeded:
            logging.shutdown()  # the logging module's own handler may have been registered earlier
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def succeed() -> None:
        nonlocal succeeded
        succeeded = True

    if module == "__main__":  # not where a program is called by another one, such as a test
        atexit.register(end)
    return succeed
