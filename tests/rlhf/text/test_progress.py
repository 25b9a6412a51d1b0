import time

import pytest

from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress, Step, format_duration, format_rate, parse_step


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
        "[ppo] iteration 4/6  loss 0.1235  2 s/iteration  0:04 left",  # 3 steps took 6 seconds, 2 are left
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
    assert (
        capsys.readouterr().err.splitlines()[-1] == "[sft] step 93/100  10 s/step  1:10 left"
    )  # 10 seconds each, 7 left


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
        progress.step(step, 20, {}, unit="first model responses")
    for seconds, step in ((100, 10), (110, 15)):
        at(seconds)
        progress.step(step, 20, {}, unit="second model responses")
    assert (
        capsys.readouterr().err.splitlines()[-1] == "[evaluation] second model responses 15/20  2 s/response  0:10 left"
    )


def test_samples_of_the_first_step_are_not_in_the_rate(at: object, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("sft", every_seconds=0)
    for step, (seconds, samples) in enumerate(((30, 8), (31, 8), (34, 4)), start=1):
        at(seconds)
        progress.step(step, 5, {}, samples=samples)
    assert capsys.readouterr().err.splitlines() == [
        "[sft] step 1/5",
        "[sft] step 2/5  8 samples/s  1 steps/s  0:03 left",
        "[sft] step 3/5  3 samples/s  2 s/step  0:04 left",  # 12 samples and 2 steps in 4 seconds
    ]


@pytest.mark.parametrize(
    ("per_second", "unit", "text"),
    [(12.345, "step", "12.3 steps/s"), (1.0, "step", "1 steps/s"), (0.05, "iteration", "20 s/iteration"),
     (2.0, "SFT model responses", "2 responses/s"), (0.5, "SFT model responses", "2 s/response")],
)  # fmt: skip
def test_format_rate(per_second: float, unit: str, text: str) -> None:
    assert format_rate(per_second, unit) == text


def test_what_is_printed_is_parsed(at: object, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("ppo", every_seconds=0)
    progress.step(1, 4, {}, unit="PPO model responses")
    at(2)
    progress.step(3, 4, {"score": -0.5, "kl": 1e-9}, unit="PPO model responses", samples=6)
    first, second = (parse_step(line.removeprefix("[ppo] ")) for line in capsys.readouterr().err.splitlines())
    assert first == Step("PPO model responses", 1, 4, ())
    values = ("score -0.5", "kl 1e-09", "3 samples/s", "1 responses/s", "0:01 left")
    assert second == Step("PPO model responses", 3, 4, values)


@pytest.mark.parametrize(
    "line", ["", "held-out loss 6.3 -> 6.2", "step 3/0", "prompts: 7 train, 2 validation", "a 1/2 b", "3/4"]
)
def test_other_lines_are_no_steps(line: str) -> None:
    assert parse_step(line) is None


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
