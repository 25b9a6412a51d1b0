"""A resident process that runs `python -m MODULE` in forks of itself; torch, transformers, MLflow and the stages are imported once.

A toy pipeline starts ten programs, and each spends six seconds on imports and less than one on its work. A fork is a process of
its own: process id, session, memory, environment, working directory, command line and exit code. It differs from a new program in
what is read at import time or at exec (OMP_NUM_THREADS, variables of libraries) and in how long it takes to start. Tests of those
start the program itself.

`python -m pipelines run` forks its stages too, and a stage in several processes forks its ranks.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import inspect
import io
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
COMMAND_LINE_BYTES = 32_768
LIBRARIES = (
    "alembic.command", "boto3", "datasets", "deepspeed", "kfp.local", "matplotlib.pyplot", "mlflow.tracking.client",
    "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store", "peft", "rich.console",
    "sklearn.linear_model", "torch.distributed.launcher.api", "transformers.generation.utils",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.modeling_gguf_pytorch_utils",
)  # fmt: skip
WARNING_FILTERS = warnings.filters[:]


class Resident:
    """Starts the resident process; closing it kills it and its forks."""

    def __init__(self, folder: Path) -> None:
        self._address = str(folder / "socket")
        padding = "x" * COMMAND_LINE_BYTES  # a fork overwrites it with its own command line
        self._log = (folder / "log").open("w+")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.resident", self._address, padding],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._server.stdout
        if "ready\n" not in iter(self._server.stdout.readline, ""):  # libraries print as well
            self._log.seek(0)
            raise RuntimeError(f"The resident process did not start: {self._log.read()}")

    def popen(
        self, command: Sequence[str], *, stdout: IO[Any], stderr: IO[Any], env: Mapping[str, str] | None = None
    ) -> "ResidentProcess":
        """Fork for `[sys.executable, "-m", MODULE, ...]`; the fork leads a session and writes to the given files."""
        assert list(command[:2]) == [sys.executable, "-m"], command
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        request = {"command": list(command), "env": dict(os.environ if env is None else env), "cwd": os.getcwd()}
        data = json.dumps(request).encode()
        socket.send_fds(connection, [len(data).to_bytes(8, "big")], [stdout.fileno(), stderr.fileno()])
        connection.sendall(data)
        return ResidentProcess(connection, list(command))

    def run(
        self, command: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Like subprocess.run with captured text."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.popen(command, stdout=out, stderr=err, env=env)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(list(command), code, out.read(), err.read())

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(timeout=30)
        self._log.close()


class ResidentProcess:
    """A fork of the resident process, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, connection: socket.socket, command: list[str]) -> None:
        self.args, self.returncode = command, None
        self._connection = connection
        self.pid = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")

    returncode: int | None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            data = self._connection.recv(8, socket.MSG_WAITALL)
            if len(data) != 8:
                raise RuntimeError("The resident process ended.")
            self.returncode = int.from_bytes(data, "big", signed=True)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- in the resident process ---


def serve(address: str) -> None:
    """Fork for each connection. Send it the process id, and the exit code when the fork has ended."""
    import_everything()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    wakeup, child_ended = socket.socketpair()
    child_ended.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(child_ended.fileno())
    running: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while True:
        ready = select.select([listener, wakeup, sys.stdin], [], [])[0]
        if wakeup in ready:
            wakeup.recv(4096)
            for pid in list(running):
                report_end(pid, running)
        if listener in ready:
            connection = listener.accept()[0]
            data, files, _, _ = socket.recv_fds(connection, 8, 2)
            request = json.loads(connection.recv(int.from_bytes(data, "big"), socket.MSG_WAITALL))
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.chdir(request["cwd"])
                become(request["command"], request["env"], *files)
            for file in files:
                os.close(file)
            running[pid] = connection
            connection.sendall(pid.to_bytes(8, "big"))
        if sys.stdin in ready:  # the tests have ended
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)


def report_end(pid: int, running: dict[int, socket.socket]) -> None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        with contextlib.suppress(OSError):  # the test did not wait for it
            running[pid].sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        running.pop(pid).close()


def import_everything() -> None:
    """Import, and compute nothing: a fork after the first parallel operation of torch would hang in OpenMP."""
    # kfp reads names from the stack, 50 times a pipeline; with torch loaded, inspect spends seconds on the source lines.
    inspect.stack = functools.partial(inspect.stack, context=0)
    for name in LIBRARIES:
        importlib.import_module(name)
    for package in ("components", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__main__.py":
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                importlib.import_module(module.removesuffix(".__init__"))


def become(command: list[str], environment: Mapping[str, str], out: int, err: int) -> NoReturn:
    """In a fork: run the command as a new Python would, and end the process."""
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.closerange(3, 65_536)  # locks and sockets of the parent
    prepare(command, environment)
    code = 1
    try:
        code = run_module(command)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(command: list[str], environment: Mapping[str, str]) -> None:
    """Set what a new process would not have from its parent."""
    os.environ.clear()
    os.environ.update(environment)
    signal.set_wakeup_fd(-1)
    for number, handler in (
        (signal.SIGCHLD, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        signal.signal(number, handler)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    # Unbuffered, because a fork would print what is left in a buffer a second time.
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, "wb", buffering=0, closefd=False), "utf-8", errors, write_through=True)
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    logging.disable(logging.NOTSET)
    warnings.filters[:] = WARNING_FILTERS  # type: ignore[index]
    random.seed()
    sys.orig_argv, sys.argv = list(command), list(command[2:])
    write_command_line(command)


def write_command_line(command: list[str]) -> None:
    """What /proc/PID/cmdline shows: the memory that the kernel put the arguments of the resident process in (proc(5))."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end
    text = b"\0".join(part.encode() for part in command)[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def run_module(command: list[str]) -> int:
    """Run the module as a program, with its own subprocesses as forks; return its exit code."""
    module = command[2]
    if module == "pipelines":
        from pipelines.local import runner

        runner.subprocess = types.SimpleNamespace(  # type: ignore[attr-defined]
            Popen=StageProcess, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
        )
    else:
        from components.rlhf.runtime import launcher

        launcher.elastic_launch = fork_ranks  # type: ignore[attr-defined]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


class StageProcess:
    """What pipelines.local.runner uses of subprocess.Popen, as a fork."""

    def __init__(self, command: list[str], *, env: Mapping[str, str], **_: Any) -> None:
        read, write = os.pipe()
        self.args, self.returncode = command, None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            become(command, env, write, write)
        os.close(write)
        self.stdout = os.fdopen(read, encoding="utf-8", errors="replace")

    returncode: int | None

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            else:
                time.sleep(0.01)
        return self.returncode


def fork_ranks(config: Any, _executable: str) -> Callable[..., Any]:
    """torchrun's agent as the product calls it, with forks in place of programs."""
    from torch.distributed.launcher.api import elastic_launch

    config.start_method = "fork"
    return elastic_launch(config, run_rank)


def run_rank(*arguments: str) -> None:
    command = [sys.executable, *arguments]
    prepare(command, dict(os.environ))
    if code := run_module(command):
        sys.exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
