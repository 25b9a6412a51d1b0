"""The other side of child.py: a program that answers requests on two pipes until the process that started it ends."""

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each line of JSON with handle(request). sys.argv has the descriptors of requests and results."""
    requests, results, own = int(sys.argv[1]), int(sys.argv[2]), os.getpid()
    # Programs that handle starts, and input() in it, must not wait for the pipe of the parent, which stays open.
    parent = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for descriptor in (parent, nothing, requests, results):
        os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            request = json.loads(line)
            answer = {"number": request.pop("number"), **handle(request)}
            if os.getpid() != own:
                os._exit(0)  # a fork that returned from handle; the process itself answers
            sys.stdout.flush()
            sys.stderr.flush()
            _write(results, json.dumps(answer).encode() + b"\n")
    os._exit(0)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _end_with(parent: int) -> None:
    """End when the other end of the parent's pipe is closed."""
    while os.read(parent, 4096):
        pass
    os._exit(1)
