"""Planned against measured memory of real stage programs; python -m benchmarks.planner measures many more cases."""

from pathlib import Path

import pytest

from benchmarks.planner.__main__ import GOAL, measure
from benchmarks.planner.cases import CASES, Case
from benchmarks.planner.inputs import make_inputs

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]
CHOSEN = ("sft 60M plain", "sft 60M LoRA", "sft 60M frozen", "sft 60M ZeRO-2 x 2", "dpo 60M plain", "dpo 60M frozen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planner")
    make_inputs(root / "60M", "60M")
    return root


@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHOSEN], ids=lambda case: case.name)
def test_plan_is_within_15_percent_of_what_a_stage_holds(case: Case, folder: Path) -> None:
    planned, measured = case.plan().main_peak()[1], max(measure(case, folder / case.size, folder))
    assert abs(planned / measured - 1) <= GOAL, (planned, measured)


def test_every_kind_of_case_is_measured() -> None:
    assert {case.name for case in CASES} >= set(CHOSEN)
    assert {case.stage for case in CASES} == {"sft", "reward_model", "ppo", "dpo", "evaluation"}
