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
    """Run code in a process of its own, because the effect of these functions on a process cannot be undone."""
    modules = ("runtime.process", "runtime.memory", "checkpoints.stop_signal")
    imports = "\n".join(f"from components.rlhf.{module} import *" for module in modules)
    command = [sys.executable, "-c", f"{imports}\n{code}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_keep_freed_memory_can_be_repeated() -> None:
    code = "for _ in range(3): keep_freed_memory(); bytearray(2**26)"
    assert start(code).wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_release_freed_memory_returns_memory_between_blocks() -> None:
    code = """
import os
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
keep_freed_memory()
blocks = [bytearray(b"x" * 2**20) for _ in range(200)]
del blocks[:-1]  # the last block keeps the heap from shrinking
before = resident()
release_freed_memory()
print(before - resident())
"""
    process = start(code)
    assert process.stdout is not None
    assert int(process.stdout.read()) > 150 * 2**20


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    """Against the same program with unbounded caches, where the processor has kernels for bf16."""
    code = """
import os, sys, torch
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
torch.set_num_threads(1)
layer = torch.nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
for tokens in (400, *range(1, 150)):
    layer(torch.zeros(tokens, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    before = resident() if tokens == 400 else before
print(resident() - before)
"""

    def growth(code: str, **environment: str) -> int:
        process = start(code, **environment)
        assert process.stdout is not None
        return int(process.stdout.read())

    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    unbounded = growth(code, **dict.fromkeys(names, "1024"))
    if unbounded < 30 * 2**20:
        pytest.skip("this processor makes no kernels for bf16")
    assert growth(f"keep_few_kernels()\n{code}") < unbounded / 2


def test_memory_functions_do_nothing_without_glibc() -> None:
    code = "platform.libc_ver = lambda: ('', ''); ctypes.CDLL = None; keep_freed_memory(); release_freed_memory()"
    assert start(code).wait() == 0


def test_old_objects_are_collected_rarely_and_young_ones_as_before() -> None:
    code = "before = gc.get_threshold(); collect_old_objects_rarely(); print(*before[:2], *gc.get_threshold())"
    process = start(f"import gc; {code}")
    assert process.stdout is not None
    young, middle, *after = map(int, process.stdout.read().split())
    assert after == [young, middle, 200]


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize("before", ["", "import time; time.sleep(2); "], ids=["after the start", "during the start"])
@pytest.mark.parametrize(("variable", "survives"), [("str(os.getpid())", False), ("''", True)])
def test_stage_dies_with_its_runner_if_configured(variable: str, survives: bool, before: str) -> None:
    """Even if the runner dies before the stage calls die_with_parent."""
    log = "print('up', flush=True); "
    call = "from components.rlhf.runtime.process import die_with_parent; die_with_parent(); "
    stage = (log + before + call if before else call + log) + "import time; time.sleep(60)"
    runner = start(
        f"import subprocess; os.environ['RLHF_DIE_WITH_PARENT'] = {variable}; "
        f"p = subprocess.Popen([sys.executable, '-c', {stage!r}], stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()",
    )
    assert runner.stdout is not None
    pid = int(runner.stdout.readline())
    runner.kill()
    runner.wait()
    runner.stdout.close()
    deadline = time.monotonic() + (4 if survives else 20)
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        assert is_running(pid) is survives
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_runs_finally_blocks() -> None:
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
        if stop.signal and {saves}:
            print('saved on', stop.name, flush=True)
            sys.exit(stop.exit_code)
finally:
    print('tidied', flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_deferred_signal_allows_saving_a_checkpoint(number: signal.Signals) -> None:
    process = start(LOOP.format(seconds=20, saves=True))
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.stdout.read() == f"saved on {number.name}\ntidied\n"
    assert process.wait() == 128 + number


@pytest.mark.parametrize("again", [True, False], ids=["second signal", "endless step"])
def test_deferred_signal_interrupts_a_long_step(again: bool) -> None:
    process = start(LOOP.format(seconds=60 if again else 1, saves=False))
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    time.sleep(0.1)
    process.terminate()  # the same signal, forwarded by torchrun's agent
    if again:
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
    assert process.stdout.read() == "tidied\n"
    assert process.wait() == 143
