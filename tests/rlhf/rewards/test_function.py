import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.config.judge import FunctionJudge
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rewards.function import FunctionScorer
from components.rlhf.rewards.owner import Owner
from components.rlhf.text.errors import InputError


def completions(*responses: str) -> list[Completion]:
    return [
        Completion(
            prompt=Prompt(prompt=f"prompt {i}"),
            prompt_ids=[1],
            response_ids=[2],
            response=response,
            logprobs=None,
            truncated=False,
        )
        for i, response in enumerate(responses)
    ]


def scorer_of(source: str, *, function: str = "mine:score", **config: Any) -> FunctionScorer:
    return FunctionScorer(FunctionJudge(kind="function", function=function, source=source, **config))


def test_function_gets_prompts_and_responses() -> None:
    source = "def score(prompts, responses):\n    return [len(r) + 0.5 * (p == 'prompt 1') for p, r in zip(prompts, responses)]"
    scores = scorer_of(source).score(completions("four", "", "naïve 映画 😀\n"))
    assert scores.tolist() == [4.0, 0.5, 11.0]


@pytest.fixture(scope="module")
def evaluating() -> Iterator[FunctionScorer]:
    """A function that returns what its first response says; torch is imported once."""
    scorer = scorer_of("import numpy, torch\ndef score(prompts, responses):\n    return eval(responses[0])")
    yield scorer
    scorer.close()


@pytest.mark.parametrize(
    "returned",
    ["[1, 2]", "(1, 2.0)", "numpy.array([1, 2])", "torch.tensor([1.0, 2.0])", "iter([True, 2])", "range(1, 3)"],
)
def test_any_sequence_of_numbers_is_accepted(returned: str, evaluating: FunctionScorer) -> None:
    assert evaluating.score(completions(returned, "b")).tolist() == [1.0, 2.0]


def test_module_may_be_dotted_or_installed() -> None:
    source = "def rate(prompts, responses):\n    return [1.0 for _ in responses]"
    assert scorer_of(source, function="team.judges.mine:rate").score(completions("a")).tolist() == [1.0]
    with pytest.raises(InputError, match=r"statistics:fmean raised TypeError"):  # found, and called with two lists
        scorer_of("", function="statistics:fmean").score(completions("a"))


def test_source_wins_over_other_modules_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "mod.py").write_text("def score(p, r):\n    return [9.0 for _ in r]")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[3]}")
    source = "def score(p, r):\n    return [1.0 for _ in r]"
    assert scorer_of("", function="pkg.mod:score").score(completions("a")).tolist() == [9.0]
    for function in ("pkg.mod:score", "json:score"):
        assert scorer_of(source, function=function).score(completions("a")).tolist() == [1.0]


def test_programs_of_the_function_do_not_wait_for_input() -> None:
    source = """
import subprocess, sys, threading, time
def score(prompts, responses):
    subprocess.run([sys.executable, "-c", "import sys; sys.stdin.read()"], timeout=20, check=True)
    threading.Thread(target=time.sleep, args=(60,)).start()
    return [1.0 for _ in responses]
"""
    started = time.monotonic()
    assert scorer_of(source, timeout_seconds=30).score(completions("a")).tolist() == [1.0]
    assert time.monotonic() - started < 20


def test_successful_call_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(5):
        scorer_of("def score(p, r):\n    return [1.0 for _ in r]").score(completions("a"))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_secrets_in_its_output_are_redacted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As all output of a stage is."""
    program = """
from components.rlhf.rewards.function import FunctionScorer
from components.rlhf.config.judge import FunctionJudge
from components.rlhf.text.redaction import redact_output
from tests.rlhf.rewards.test_function import completions
redact_output()
source = "import os\\ndef score(p, r):\\n    print('the key is', os.environ['MY_API_KEY'])\\n    return [1.0]"
FunctionScorer(FunctionJudge(kind="function", function="mine:score", source=source)).score(completions("a"))
"""
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": str(root), "MY_API_KEY": "hunter2hunter2"}
    result = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the key is ***" in result.stderr and "hunter2" not in result.stderr + result.stdout


def test_function_may_print(capfd: pytest.CaptureFixture[str]) -> None:
    source = "print('loading')\ndef score(prompts, responses):\n    print('{\"scores\": [9]}')\n    return [1.0]"
    assert scorer_of(source).score(completions("a")).tolist() == [1.0]
    assert "loading" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise ValueError('bad\\nday')", "raised ValueError: bad day"),
        ("return [1.0]", "returned 1 scores for 2 responses"),
        ("return [1.0, 2.0, 3.0]", "returned 3 scores for 2 responses"),
        ("return [1.0, float('nan')]", "scored the response 'two' as nan"),
        ("return [float('inf'), 1.0]", "scored the response 'one' as inf"),
        ("return '12'", "raised TypeError: it returned a str, not a list of numbers"),
        ("return {1: 2, 3: 4}", "raised TypeError: it returned a dict, not a list of numbers"),
        ("return None", "raised TypeError: 'NoneType' object is not iterable"),
        ("return ['good', 'bad']", "raised ValueError: could not convert string to float"),
        ("return [[1.0], [2.0]]", "raised TypeError: float"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3"),
        ("import os; os._exit(0)", "ended without a result"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended without a result"),
        ("import missing_package_x", "raised ModuleNotFoundError: No module named 'missing_package_x'"),
        ("return [1e300, -1e300]", "scored the response 'one' as inf"),
    ],
)
def test_failure_is_one_sentence(body: str, problem: str) -> None:
    source = f"def score(prompts, responses):\n    {body}"
    with pytest.raises(InputError) as error:
        scorer_of(source).score(completions("one", "two"))
    assert str(error.value).startswith(f"The judge's function mine:score {problem}")
    assert str(error.value).endswith("; correct the function.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [("def score(:", "raised SyntaxError"), ("x = 1", "raised AttributeError"), ("1 / 0", "raised ZeroDivisionError")],
)
def test_module_that_cannot_be_imported(source: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        scorer_of(source).score(completions("one"))


def test_function_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    source = f"""
import subprocess, sys, time
def score(prompts, responses):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
    time.sleep(60)
"""
    with pytest.raises(
        InputError, match=r"did not return within 1.5 seconds; raise judge.timeout_seconds if it needs more"
    ):
        scorer_of(source, timeout_seconds=1.5).score(completions("one"))
    child = int((tmp_path / "child").read_text())
    assert has_ended(child)


def test_function_ends_with_a_stage_that_is_killed(tmp_path: Path) -> None:
    """The stage is killed while the function runs; nothing is left behind."""
    program = f"""
from components.rlhf.rewards.function import FunctionScorer
from components.rlhf.config.judge import FunctionJudge
from tests.rlhf.rewards.test_function import completions
source = "import os, time\\ndef score(p, r):\\n    open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid()))\\n    time.sleep(60)"
FunctionScorer(FunctionJudge(kind="function", function="mine:score", source=source)).score(completions("a"))
"""
    root = Path(__file__).resolve().parents[3]
    stage = subprocess.Popen([sys.executable, "-c", program], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and stage.poll() is None
        time.sleep(0.05)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert has_ended(int((tmp_path / "pid").read_text()))


def has_ended(pid: int) -> bool:
    """Whether a process that is not our child ends within 10 seconds (a zombie has ended)."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


# --- one process for many calls ---

COUNTING = """
import os
calls = 0
def score(prompts, responses):
    global calls
    calls += 1
    return [calls + 10 * (os.getpid() % 1_000_000) for _ in responses]
"""


def test_process_is_kept_until_close() -> None:
    """The number of the call is the last digit of the score, and the process the others, which fp32 represents exactly."""
    scorer = scorer_of(COUNTING)
    first, second = (int(scorer.score(completions("a"))[0]) for _ in range(2))
    assert second == first + 1
    scorer.close()
    scorer.close()
    third = int(scorer.score(completions("a"))[0])
    assert third % 10 == 1 and third // 10 != first // 10
    process = scorer._child.process if scorer._child else None
    del scorer  # as when a stage forgets it
    assert process is not None and process.returncode is not None


@pytest.mark.parametrize(
    ("crash", "config"),
    [
        ("os._exit(1)", {}),
        ("os.kill(os.getpid(), 11)", {}),
        ("os.close(int(sys.argv[2])); time.sleep(60)", {"timeout_seconds": 10}),  # the pipe of the results
        ("time.sleep(60)", {"timeout_seconds": 1.5}),
        ("keep = bytearray(2**29); keep[::4096] = b'x' * 2**17; time.sleep(60)", {"memory_gib": 0.3, "timeout_seconds": 30}),
        ("subprocess.run([sys.executable, '-c', 'keep = bytearray(2**29); keep[::4096] = b\"x\" * 2**17; import time; time.sleep(60)'])",
         {"memory_gib": 0.3, "timeout_seconds": 30}),
    ],
    ids=["exit", "signal", "closed pipe", "hangs", "memory", "memory of a child"],
)  # fmt: skip
def test_call_in_which_the_process_is_lost_is_made_once_more(
    crash: str, config: dict[str, float], tmp_path: Path
) -> None:
    source = f"""
import os, subprocess, sys, time
def score(prompts, responses):
    if not os.path.exists({str(tmp_path / "crashed")!r}):
        open({str(tmp_path / "crashed")!r}, "w").close()
        {crash}
    return [1.0 for _ in responses]
"""
    log: list[str] = []
    scorer = FunctionScorer(
        FunctionJudge(kind="function", function="mine:score", source=source, **config), log=log.append
    )
    assert scorer.score(completions("a")).tolist() == [1.0]
    assert len(log) == 1 and log[0].endswith("; it is called again in a new process")
    (tmp_path / "crashed").unlink()
    assert scorer.score(completions("a")).tolist() == [1.0]  # and in any later call


def test_memory_that_is_always_too_much_is_one_sentence() -> None:
    source = "import time\ndef score(p, r):\n    keep = bytearray(2**29)\n    keep[::4096] = b'x' * 2**17\n    time.sleep(60)"
    with pytest.raises(InputError, match=r"took more than 0.3 GiB of memory; raise judge.memory_gib if it needs more"):
        scorer_of(source, memory_gib=0.3, timeout_seconds=30).score(completions("a"))


def test_fork_that_returns_too_does_not_answer_twice() -> None:
    source = """
import os
calls = 0
def score(prompts, responses):
    global calls
    calls += 1
    os.fork()
    return [float(calls) for _ in responses]
"""
    scorer = scorer_of(source)
    assert [scorer.score(completions("a")).tolist() for _ in range(4)] == [[1.0], [2.0], [3.0], [4.0]]


def test_function_that_raises_is_not_called_again(tmp_path: Path) -> None:
    source = f"def score(p, r):\n    open({str(tmp_path / 'calls')!r}, 'a').write('x')\n    raise ValueError('no')"
    scorer = scorer_of(source)
    with pytest.raises(InputError, match="raised ValueError: no"):
        scorer.score(completions("a"))
    assert (tmp_path / "calls").read_text() == "x"


@pytest.mark.parametrize(
    ("signature", "gets_columns"),
    [
        ("prompts, responses", False),
        ("prompts, responses, columns", True),
        ("prompts, responses, columns=None", True),
        ("prompts, responses, data", True),
        ("prompts, responses, verbose=False", False),
        ("prompts, responses, *, verbose=False", False),
        ("*args", False),
    ],
)
def test_columns_are_passed_to_functions_that_take_them(signature: str, gets_columns: bool) -> None:
    source = f"""
import inspect
def score({signature}):
    given = locals()
    columns = next((v for v in given.values() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    return [9.0, 9.0] if columns is None else [float(row["answer"]) for row in columns]
"""
    rows = [
        replace(c, prompt=replace(c.prompt, columns={"answer": str(i)})) for i, c in enumerate(completions("a", "b"))
    ]
    assert scorer_of(source).score(rows).tolist() == ([0.0, 1.0] if gets_columns else [9.0, 9.0])


def test_code_of_a_folder_is_on_the_path_of_its_process_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from helpers.value import VALUE\ndef score(p, r):\n    return [VALUE for _ in r]"
    )
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "value.py").write_text("VALUE = 7")
    (tmp_path / "json.py").write_text("raise Exception('not this one')")  # the process itself has imported its own
    config = FunctionJudge(kind="function", function="mine:score")
    assert FunctionScorer(config, code=tmp_path).score(completions("a")).tolist() == [7.0]
    assert str(tmp_path) not in sys.path
    with pytest.raises(InputError, match="raised ModuleNotFoundError: No module named 'mine'"):
        FunctionScorer(config).score(completions("a"))


def test_reward_is_named_in_errors() -> None:
    owner = Owner(title="reward style", key="ppo.rewards.3")
    config = FunctionJudge(
        kind="function",
        function="mine:score",
        source="import time\ndef score(p, r):\n    time.sleep(60)",
        timeout_seconds=0.5,
    )
    with pytest.raises(InputError) as error:
        FunctionScorer(config, owner=owner).score(completions("a"))
    assert str(error.value) == (
        "The reward style's function mine:score did not return within 0.5 seconds; raise ppo.rewards.3.timeout_seconds if it needs "
        "more; correct the function."
    )


def test_no_responses_start_no_process() -> None:
    assert scorer_of("raise Exception").score([]).shape == (0,)


def test_scores_keep_their_order_in_large_calls() -> None:
    source = "def score(prompts, responses):\n    return [float(r) for r in responses]"
    scores = scorer_of(source).score(completions(*map(str, range(3000))))
    assert scores.tolist() == list(range(3000)) and not math.isnan(scores.sum().item())
