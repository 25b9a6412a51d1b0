"""A TCP proxy in front of an HTTP server that injects faults into responses and records them."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

_BUSY = b"<Error><Code>SlowDown</Code><Message>Busy</Message></Error>"
UNAVAILABLE = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    b"%s" % (len(_BUSY), _BUSY)
)
INTERNAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultProxy:
    """fault(number, first line of the request) returns the fault of the connection with this number (from 0), or None.

    Faults: "503" and "500" instead of the response; "away" closes at once, "reset" and "truncate" after `after` bytes of the
    response, "headless" after its status line; "corrupt" flips a bit, "slow" delays the response, and "lost" forwards the
    request and discards the response. Every connection serves one request.
    """

    def __init__(self, port: int, fault: Callable[[int, str], str | None], *, after: int = 100_000) -> None:
        self.upstream, self.fault, self.after = port, fault, after
        self.injected: list[tuple[str, str]] = []  # (fault, first line)
        self.first_lines: list[str] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve_connection, args=(connection,), daemon=True).start()

    def _serve_connection(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            self._serve(connection)

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(65536)
            if not data:
                return
            head += data
        line = head.split(b"\r\n", 1)[0].decode()
        with self._lock:
            fault = self.fault(len(self.first_lines), line)
            self.first_lines.append(line)
            if fault:
                self.injected.append((fault, line))
        if fault == "away":
            return
        if fault in ("503", "500"):
            client.sendall(UNAVAILABLE if fault == "503" else INTERNAL)
            client.shutdown(socket.SHUT_WR)
            client.settimeout(1)
            with contextlib.suppress(OSError):
                while client.recv(65536):
                    pass
            return
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            # One request per connection, so that requests are numbered.
            first, rest = head.split(b"\r\n", 1)
            server.sendall(first + b"\r\nConnection: close\r\n" + rest)
            pump = threading.Thread(target=_pump, args=(client, server), daemon=True)
            pump.start()
            try:
                self._respond(client, server, fault)
            finally:
                # close() does not notify the peer while another thread reads from the socket.
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RD)
                pump.join()

    def _respond(self, client: socket.socket, server: socket.socket, fault: str | None) -> None:
        num_sent = 0
        while data := server.recv(65536):
            if fault == "lost":
                continue
            if fault == "headless":
                client.sendall(data[: data.index(b"\r\n") + 2])
                return
            if fault == "corrupt" and num_sent > 0:
                data = bytes([data[0] ^ 1]) + data[1:]
                fault = None
            if fault in ("reset", "truncate") and num_sent + len(data) > self.after:
                client.sendall(data[: max(0, self.after - num_sent)])
                if fault == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if fault == "slow":
                time.sleep(0.02)
            client.sendall(data)
            num_sent += len(data)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
