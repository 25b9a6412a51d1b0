"""Servers on this machine that a command starts."""

import socket
import subprocess
import time
import urllib.error
import urllib.request

from components.rlhf.text.errors import InputError

START_SECONDS = 120.0


def require_free_port(port: int) -> None:
    """Raise InputError if a server uses the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(
                f"Port {port} cannot be used ({error.strerror}); choose another one with --port."
            ) from None


def page_when_ready(process: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until the server answers; False if its process has ended before, or it takes minutes."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False
