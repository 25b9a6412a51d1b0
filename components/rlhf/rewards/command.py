"""A command of the user that scores one response at a time, such as a sandbox that runs it."""

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from components.rlhf.config.scoring import Command
from components.rlhf.data.records import Completion
from components.rlhf.rewards.owner import Owner, require_few_failures
from components.rlhf.rewards.protocol import ComputedStates

MAX_OUTPUT_BYTES = 2**16  # the capacity of a pipe, so that one read is all that a process has left in it
TICK_SECONDS = 0.02
INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")  # nothing that may be a secret


class CommandScorer:
    """Runs the command in an empty folder for each response. Implements Scorer.

    The folder has response.txt, prompt.txt and columns.json, standard input is the response, and the environment has no secrets. A command
    that takes too long is ended with all that it has started, and scores 0. counts["failed"] is the number of those, and of commands that
    should print a number and did not.
    """

    def __init__(self, config: Command, owner: Owner, code: Path | None, log: Callable[[str], None]) -> None:
        """code is a folder with programs and modules of the user: first on PATH and PYTHONPATH, and named by CODE."""
        self.config, self.owner, self.code, self.log = config, owner, code, log
        self.counts: Counter[str] = Counter(failed=0)
        self._has_failed = False

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises InputError if the command does not start, or if too many runs take too long or print no number."""
        with ThreadPoolExecutor(self.config.max_concurrency) as executor:
            results = list(executor.map(self._run, completions))
        failed = [completion for completion, result in zip(completions, results, strict=True) if result is None]
        self.counts["failed"] += len(failed)
        limit = f"{self.config.timeout_seconds:g} seconds"
        no_number = " or made it print no number" if self.config.score == "printed" else ""
        require_few_failures(
            self.owner,
            failed,
            len(completions),
            f"kept the command running for more than {limit}{no_number}",
            f"correct the command, or raise {self.owner.key}.timeout_seconds",
            self.log,
        )
        return torch.tensor([result or 0.0 for result in results], dtype=torch.float32)

    def _run(self, completion: Completion) -> float | None:
        """The score; None without one."""
        with tempfile.TemporaryDirectory(prefix="command-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            (folder / "response.txt").write_text(completion.response, encoding="utf-8")
            (folder / "prompt.txt").write_text(completion.prompt.prompt, encoding="utf-8")
            columns = json.dumps(dict(completion.prompt.columns), ensure_ascii=False)
            (folder / "columns.json").write_text(columns, encoding="utf-8")
            environment = self._environment(folder)
            program = shutil.which(self.config.command[0], path=environment["PATH"])
            if program is None:
                raise self.owner.error(
                    f"needs the program {self.config.command[0]}, which is not on the PATH; correct {self.owner.key}.command"
                )
            with (folder / "response.txt").open("rb") as response:
                code, output = self._execute(program, folder, environment, response)
        printed = output.decode("utf-8", errors="replace")
        if code and not self._has_failed:
            self._has_failed = True
            self.log(
                f"{self.owner.title}: the first command to fail exits with {code}; its last words: {last_line(printed)[-200:]!r}"
            )
        if code is None:
            return None
        return float(code == 0) if self.config.score == "exit_code" else read_number(printed)

    def _execute(
        self, program: str, folder: Path, environment: dict[str, str], response: IO[bytes]
    ) -> tuple[int | None, bytes]:
        """Run the command; its exit code, or None if it is ended because it takes too long, and the end of what it prints."""
        try:
            process = subprocess.Popen(
                [program, *self.config.command[1:]],
                stdin=response,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if self.config.score == "exit_code" else subprocess.DEVNULL,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise self.owner.error(
                f"cannot start {program} ({error.strerror}); correct {self.owner.key}.command"
            ) from None
        try:
            return _read_until_end(process, self.config.timeout_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
            process.wait()
            assert process.stdout
            process.stdout.close()

    def _environment(self, folder: Path) -> dict[str, str]:
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= {"HOME": str(folder), "TMPDIR": str(folder)}
        environment.setdefault("PATH", os.defpath)
        if self.code:
            code = str(self.code.resolve())
            path = f"{code}{os.pathsep}{environment['PATH']}"
            environment |= {"PATH": path, "PYTHONPATH": code, "CODE": code}
        return environment


def _read_until_end(process: "subprocess.Popen[bytes]", seconds: float) -> tuple[int | None, bytes]:
    """The exit code, or None if the process does not end in time, and the last MAX_OUTPUT_BYTES that it prints."""
    assert process.stdout
    pipe, deadline, output = process.stdout.fileno(), time.monotonic() + seconds, b""
    os.set_blocking(pipe, False)
    is_open, poller = True, select.poll()
    poller.register(pipe, select.POLLIN)
    while time.monotonic() < deadline:
        # Before the last read, so that nothing is missed; what it has started may hold the pipe open, and go on printing.
        code = process.poll()
        if is_open and poller.poll(0 if code is not None else 1000 * TICK_SECONDS):
            data = os.read(pipe, MAX_OUTPUT_BYTES)
            output, is_open = (output + data)[-MAX_OUTPUT_BYTES:], bool(data)
        elif not is_open and code is None:
            time.sleep(TICK_SECONDS)
        if code is not None:
            return code, output
    return None, output


def read_number(printed: str) -> float | None:
    """The finite number in the last line with text; None for anything else."""
    try:
        number = float(last_line(printed))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def last_line(printed: str) -> str:
    """The last line with text."""
    return next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
