"""The checks of a run in the gate's decision, and which checks an evaluation accepts."""

from pathlib import Path
from typing import Any

import pytest

from components.evaluation.checked import read_checks, with_checks
from components.evaluation.verdict import Decision
from components.rlhf.artifacts.check_rows import CheckRow, save_rows
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig
from components.rlhf.text.errors import InputError

PROMOTE, REJECT = Decision(decision="promote", reason="it wins"), Decision(decision="reject", reason="KL is high")
SFT, POLICY, OTHER = (
    Manifest(kind=kind, files={}, facts={"n": n})
    for kind, n in (("sft_model", 1), ("policy_model", 2), ("policy_model", 3))
)


def row(check: str, *, passed: bool) -> CheckRow:
    return CheckRow(check=check, unit="u", num=1, value=1.0, low=1.0, high=1.0, about="the increase", bound="max_increase",
                    limit=0.5, passed=passed)  # fmt: skip


FAILURE = "check b: increase of 1.000 [1.000, 1.000] u breaks max_increase 0.5"


@pytest.mark.parametrize(
    ("decision", "rows", "expected"),
    [
        (PROMOTE, [], ("promote", "it wins")),
        (
            PROMOTE,
            [row("a", passed=True), row("b", passed=True)],
            ("promote", "it wins, and it passes the checks a, b"),
        ),
        (PROMOTE, [row("a", passed=True), row("b", passed=False)], ("reject", FAILURE)),
        (REJECT, [row("b", passed=False)], ("reject", f"KL is high; {FAILURE}")),
        (REJECT, [row("a", passed=True)], ("reject", "KL is high")),
    ],
)
def test_policy_must_win_and_pass_every_check(
    decision: Decision, rows: list[CheckRow], expected: tuple[str, str]
) -> None:
    found = with_checks(decision, rows)
    assert (found.decision, found.reason) == expected


def read(folder: Path | None, *names: str, policy: Manifest = POLICY) -> list[CheckRow]:
    config = EvaluationStageConfig(
        model=ModelConfig(),
        evaluation=EvaluationConfig(),
        sampling=SamplingConfig(),
        gate=GateConfig(),
        seed=0,
        check_names=names,
    )
    parents = {"sft_model": SFT.digest, "policy_model": POLICY.digest}
    inputs: dict[str, Any] = {
        "sft_model": SFT,
        "policy_model": policy,
        "checks": Manifest(kind="checks", files={}, parents=parents),
    }
    return read_checks(folder, inputs, config)


def test_checks_of_the_same_policy_are_read(tmp_path: Path) -> None:
    save_rows([row("a", passed=True), row("b", passed=False)], tmp_path)
    assert [each.check for each in read(tmp_path, "b", "a")] == ["a", "b"]
    assert read(None) == []


@pytest.mark.parametrize("names", [(), ("a",), ("a", "b", "c")])
def test_other_checks_than_those_of_the_settings_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_rows([row("a", passed=True), row("b", passed=True)], tmp_path)
    with pytest.raises(InputError, match="pass the checks of this run"):
        read(tmp_path, *names)


def test_run_with_checks_needs_their_rows() -> None:
    with pytest.raises(InputError, match="have the checks a .*and the input checks has none"):
        read(None, "a")


def test_checks_of_another_policy_are_refused(tmp_path: Path) -> None:
    save_rows([row("a", passed=True)], tmp_path)
    with pytest.raises(InputError, match="checks of another policy model"):
        read(tmp_path, "a", policy=OTHER)
