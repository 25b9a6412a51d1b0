import time

import pytest

from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress, format_duration


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> object:
    def set_clock(seconds: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + seconds)

    set_clock(0)
    return set_clock


def test_log_prints_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("sft").log("hello")
    assert capsys.readouterr() == ("", "[sft] hello\n")


def test_steps_are_printed_at_the_interval(at: object, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("ppo", every_seconds=5)
    for step, seconds in enumerate((10, 12, 14, 16, 18), start=1):
        at(seconds)
        progress.step(step, 6, {"loss": 0.123456}, unit="iteration")
    assert capsys.readouterr().err.splitlines() == [
        "[ppo] iteration 1/6  loss 0.1235",  # no estimate yet, because the first step includes loading
        "[ppo] iteration 4/6  loss 0.1235  0:04 left",  # 3 steps took 6 seconds, 2 are left
    ]


def test_last_step_is_always_printed(at: object, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("sft", every_seconds=5)
    for step in (1, 2, 3):
        progress.step(step, 3, {})
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "[sft] step 1/3",
        "[sft] step 3/3",
    ]


def test_time_left_after_resume_excludes_earlier_steps(at: object, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("sft", every_seconds=5)
    progress.step(91, 100, {})
    at(20)
    progress.step(93, 100, {})
    assert capsys.readouterr().err.splitlines()[-1] == "[sft] step 93/100  1:10 left"  # 10 seconds each, 7 left


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (187, "3:07"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (36_065, "10:01:05"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_new_unit_starts_a_new_estimate(at: object, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("evaluation", every_seconds=5)
    for seconds, step in ((0, 10), (60, 20)):
        at(seconds)
        progress.step(step, 20, {}, unit="first model answered")
    for seconds, step in ((100, 10), (110, 15)):
        at(seconds)
        progress.step(step, 20, {}, unit="second model answered")
    assert capsys.readouterr().err.splitlines()[-1] == "[evaluation] second model answered 15/20  0:10 left"


@pytest.mark.parametrize(("seconds", "shown"), [("0", ["1", "2", "3", "4"]), ("3600", ["1", "4"])])
def test_interval_comes_from_environment(
    seconds: str, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_PROGRESS_SECONDS", seconds)
    progress = Progress("sft")
    for step in range(1, 5):
        progress.step(step, 4, {})
    assert [line.split("/")[0].rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == shown


def test_invalid_interval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PROGRESS_SECONDS", "often")
    with pytest.raises(InputError, match="RLHF_PROGRESS_SECONDS is 'often'"):
        Progress("sft")
