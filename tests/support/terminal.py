"""A terminal for tests: programs run in it, keys are typed into it, and its screen is read."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Text, or one of the sequences that rich and readline send (ECMA-48).
TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07]*\x07|\x1b.|[\r\n\b]|[^\x1b\r\n\b]+")

CONTROL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Screen:
    """What a terminal of this width shows, with all that has scrolled off; of movements only those of rich's Live and of readline."""

    def __init__(self, width: int) -> None:
        self.width, self.rows, self.row, self.column = width, [""], 0, 0

    def feed(self, text: str) -> None:
        for token in TOKEN.finditer(text):
            what = token[0]
            if what == "\r":
                self.column = 0
            elif what == "\n":
                self._down()
            elif what == "\b":
                self.column = max(0, self.column - 1)
            elif token[2]:
                self._move(token[2], token[1])
            elif not what.startswith("\x1b"):
                for char in what.replace("\x07", ""):
                    self._put(char)

    def _put(self, char: str) -> None:
        if self.column == self.width:
            self.column = 0
            self._down()
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + char + row[self.column + 1 :]
        self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    def _move(self, command: str, argument: str) -> None:
        count = int(argument or 1) if argument.isdigit() or not argument else 0
        row = self.rows[self.row]
        if command == "A":
            self.row = max(0, self.row - count)
        elif command == "K" and argument == "2":
            self.rows[self.row] = ""
        elif command == "K" and argument in ("", "0"):
            self.rows[self.row] = row[: self.column]
        elif command == "C":
            self.column = min(self.width, self.column + count)
        elif command == "D":
            self.column = max(0, self.column - count)

    @property
    def lines(self) -> list[str]:
        """The rows without spaces at their ends."""
        return [row.rstrip() for row in self.rows]


class Terminal:
    """A program in a pseudo-terminal of its own, which is killed at the end of the block."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], width: int = 100) -> None:
        self.screen, self._text = Screen(width), ""
        env = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
        self._fd, own = pty.openpty()
        fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        # A session whose terminal this is, so that Ctrl-C reaches the program.
        control = [sys.executable, "-c", CONTROL, *command]
        self._process = subprocess.Popen(
            control, cwd=cwd, env=env, stdin=own, stdout=own, stderr=own, start_new_session=True
        )
        os.close(own)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._fd)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str, *, timeout: float = 120) -> None:
        """Read until the program has written this text after what was waited for before."""
        deadline = time.monotonic() + timeout
        while text not in self._text:
            assert self._read(deadline), f"{text!r} is not in {self.screen.lines}"
        self._text = self._text.partition(text)[2]

    def wait(self, *, timeout: float = 120) -> int:
        """Read until the program ends; its exit code."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self._process.wait(timeout)

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def _read(self, deadline: float) -> bool:
        """Read something; False if the program has ended."""
        if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"Nothing more was written: {self.screen.lines}")
        try:
            data = os.read(self._fd, 65_536)
        except OSError:  # EIO: the program has ended
            return False
        text = data.decode(errors="replace")
        self._text += text
        self.screen.feed(text)
        return bool(data)


def program(*arguments: object) -> list[str]:
    """The command line of kfp-rlhf."""
    return [sys.executable, "-m", "pipelines", *map(str, arguments)]
