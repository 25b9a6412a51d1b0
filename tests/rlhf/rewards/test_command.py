"""Commands of the user: what they are given, how they score, and every way in which they fail."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.config.scoring import Command
from components.rlhf.rewards.command import CommandScorer, read_number
from components.rlhf.rewards.owner import Owner
from components.rlhf.text.errors import InputError
from tests.support.reward_server import Logs, completions

OWNER = Owner(title="reward tests", key="ppo.rewards.0")


def scorer_of(script: str, *, code: Path | None = None, log: Logs | None = None, **config: Any) -> CommandScorer:
    settings = Command(kind="command", command=("sh", "-c", script), **config)
    return CommandScorer(settings, OWNER, code, Logs() if log is None else log)


def test_exit_code_is_the_score() -> None:
    log = Logs()
    scorer = scorer_of('test "$(cat)" = good || { echo "not good" >&2; exit 3; }', log=log)
    assert scorer.score(completions("good", "bad", "good", "")).tolist() == [1, 0, 1, 0]
    assert scorer.score([]).shape == (0,)
    assert log == ["reward tests: the first command to fail exits with 3; its last words: 'not good'"]


def test_printed_number_is_the_score() -> None:
    scorer = scorer_of("echo thinking; wc -c < response.txt", score="printed")
    assert scorer.score(completions("four", "", "é")).tolist() == [4, 0, 2]


def test_files_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt and the columns, an empty home, and no secrets."""
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    (tmp_path / "check.py").write_text(
        "import json, os, sys\n"
        "assert sys.stdin.read() == open('response.txt').read() == 'naïve\\n'\n"
        "assert open('prompt.txt').read() == 'prompt 0 '\n"
        "assert json.load(open('columns.json')) == {'answer': '4'}\n"
        "assert os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd()\n"
        "assert 'hunter2' not in str(os.environ)\n"
        "import helper\n"
    )
    (tmp_path / "helper.py").write_text("")
    program = tmp_path / "run-check"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$CODE/check.py"\n')
    program.chmod(0o755)
    settings = Command(kind="command", command=("run-check",))
    assert CommandScorer(settings, OWNER, tmp_path, Logs()).score(completions("naïve\n", answer="4")).tolist() == [1]


def test_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    log = Logs()
    script = f'test "$(cat)" = slow && {{ sleep 60 & echo $! > {tmp_path}/child; wait; }}; exit 0'
    scorer = scorer_of(script, timeout_seconds=1.0, log=log)
    started = time.monotonic()
    assert scorer.score(completions("a", "slow", "b", "c")).tolist() == [1, 0, 1, 1]
    assert time.monotonic() - started < 10
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}/stat") and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (
        scorer.counts["failed"] == 1 and "1 of 4 responses kept the command running for more than 1 seconds" in log[-1]
    )


def test_parallelism_is_limited(tmp_path: Path) -> None:
    script = f"touch {tmp_path}/$$; ls {tmp_path} | wc -l; sleep 0.1; rm {tmp_path}/$$"
    scorer = scorer_of(f"n=$({script}); echo $n", score="printed", max_concurrency=3)
    assert 1 <= max(scorer.score(completions(*"abcdefghij")).tolist()) <= 3


@pytest.mark.parametrize(
    ("script", "config", "scores"),
    [
        ("kill -9 $$", {}, [0.0] * 3),
        ("exit 127", {}, [0.0] * 3),
        ("seq 300000", {"score": "printed", "timeout_seconds": 30}, [300000.0] * 3),
        ("sleep 60 & echo 3", {"score": "printed", "timeout_seconds": 30}, [3.0] * 3),
        ("exec >&-; sleep 0.1; exit 0", {"timeout_seconds": 30}, [1.0] * 3),
        ("echo 0.25; exit 1", {"score": "printed"}, [0.25] * 3),
    ],
)
def test_unusual_ends(script: str, config: dict[str, Any], scores: list[float]) -> None:
    assert scorer_of(script, **config).score(completions("a", "b", "c")).tolist() == scores


@pytest.mark.parametrize(
    ("script", "config", "problem"),
    [
        (
            "sleep 60",
            {"timeout_seconds": 0.2},
            "is of no use: 3 of 3 responses kept the command running for more than 0.2 seconds",
        ),
        ("echo good", {"score": "printed"}, "or made it print no number"),
        ("echo nan", {"score": "printed"}, "or made it print no number"),
    ],
)
def test_failure_is_one_sentence(script: str, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as error:
        scorer_of(script, **config).score(completions("a", "b", "c"))
    text = str(error.value)
    assert (
        text.startswith("The reward tests ")
        and problem in text
        and "correct the command" in text
        and text.isprintable()
    )


def test_missing_or_broken_program(tmp_path: Path) -> None:
    settings = Command(kind="command", command=("no-such-program",))
    with pytest.raises(
        InputError, match=r"needs the program no-such-program, which is not on the PATH; correct ppo.rewards.0.command"
    ):
        CommandScorer(settings, OWNER, None, Logs()).score(completions("a"))
    (tmp_path / "broken").write_bytes(b"\x7fELF broken")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(InputError, match=r"cannot start .*broken \(Exec format error\)"):
        CommandScorer(Command(kind="command", command=("broken",)), OWNER, tmp_path, Logs()).score(completions("a"))


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(alphabet="ab \n", max_size=10),
    st.sampled_from(["", "\n", " \n\n"]),
)
def test_number_is_that_of_the_last_line(number: float, before: str, after: str) -> None:
    assert read_number(f"{before}\n{number!r}{after}") == number


@pytest.mark.parametrize("printed", ["", "\n", "one", "1 2", "inf", "-inf", "nan", "1\nend"])
def test_what_is_no_number(printed: str) -> None:
    assert read_number(printed) is None
