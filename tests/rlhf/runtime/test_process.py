import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

IMPORTS = """
from components.rlhf.runtime.process import *
from components.rlhf.runtime.memory import *
from components.rlhf.checkpoints.stop_signal import *
"""
ROOT = Path(__file__).resolve().parents[3]


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """What these functions do stays with a process for good: each test has its own."""
    command = [
        sys.executable,
        "-c",
        IMPORTS + code,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_keeping_freed_memory_harms_nobody() -> None:
    code = "for _ in range(3): keep_freed_memory(); bytearray(2**26)"
    assert start(code).wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is glibc on most Linux")
def test_memory_that_is_free_between_blocks_in_use_is_given_back() -> None:
    code = """
import os
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
keep_freed_memory()
blocks = [bytearray(b"x" * 2**20) for _ in range(200)]
del blocks[:-1]  # the last one keeps the heap from shrinking
before = resident()
release_freed_memory()
print(before - resident())
"""
    process = start(code)
    assert process.stdout is not None
    assert int(process.stdout.read()) > 150 * 2**20


def test_other_c_libraries_are_left_alone() -> None:
    code = "platform.libc_ver = lambda: ('', ''); ctypes.CDLL = None; keep_freed_memory(); release_freed_memory()"
    assert start(code).wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
@pytest.mark.parametrize("before", ["", "import time; time.sleep(2); "], ids=["later", "while the stage starts"])
@pytest.mark.parametrize(("asked", "survives"), [("str(os.getpid())", False), ("''", True)])
def test_a_stage_dies_with_its_runner_where_it_is_asked_to(asked: str, survives: bool, before: str) -> None:
    """Also when the runner dies before the stage comes to ask for it."""
    log = "print('up', flush=True); "
    own = "from components.rlhf.runtime.process import die_with_parent; die_with_parent(); "
    stage = (log + before + own if before else own + log) + "import time; time.sleep(60)"
    runner = start(
        f"import subprocess; os.environ['RLHF_DIE_WITH_PARENT'] = {asked}; "
        f"p = subprocess.Popen([sys.executable, '-c', {stage!r}], stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()",
    )
    assert runner.stdout is not None
    pid = int(runner.stdout.readline())
    runner.kill()
    runner.wait()
    runner.stdout.close()
    deadline = time.monotonic() + (4 if survives else 20)
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        assert running(pid) is survives
    finally:
        if running(pid):
            os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    """Whether the process is there and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_runs_what_stands_in_finally() -> None:
    process = start(
        "StopSignal().install()\nimport time\ntry:\n  print('up', flush=True); time.sleep(60)\nfinally:\n  print('tidied', flush=True)"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    assert process.stdout.readline() == "tidied\n"
    assert process.wait() == 143


LOOP = """
stop = StopSignal()
StopSignal.SECONDS_TO_SAVE, StopSignal.SAME_SIGNAL_SECONDS = {seconds}, 0.3
stop.install(); stop.defer()
import sys, time
print('up', flush=True)
try:
    for _ in range(600):
        time.sleep(0.1)
        if stop.signal and {looks}:
            print('saved on', stop.name, flush=True)
            sys.exit(stop.exit_code)
finally:
    print('tidied', flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_deferred_signal_lets_a_checkpoint_be_saved(number: signal.Signals) -> None:
    process = start(LOOP.format(seconds=20, looks=True))
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.stdout.read() == f"saved on {number.name}\ntidied\n"
    assert process.wait() == 128 + number


@pytest.mark.parametrize("again", [True, False], ids=["signalled again", "a step without end"])
def test_a_step_that_takes_too_long_is_not_waited_for(again: bool) -> None:
    process = start(LOOP.format(seconds=60 if again else 1, looks=False))
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    time.sleep(0.1)
    process.terminate()  # the same signal by another way: torchrun's agent passes it on
    if again:
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
    assert process.stdout.read() == "tidied\n"
    assert process.wait() == 143
