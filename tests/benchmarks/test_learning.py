"""Curves, tables and settings of the comparison of learning with TRL."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import benchmarks.learning.__main__ as program
from benchmarks.learning.arms import OURS_ARM, SFT, TRL, TRL_OWN, Plan, row_key, rows_of, settings_of
from benchmarks.learning.curves import common_kl, compare, curve_of, read_at
from benchmarks.learning.page import tables, write_page
from benchmarks.learning.runs import OUTPUTS, Artifacts
from benchmarks.record import ROOT, read_rows

PLAN = Plan(num_iterations=4, every=2, num_prompts=256)


def row(system: str, iteration: int, kl: float, judge: float, seed: int = 3) -> dict[str, Any]:
    return row_key(system, PLAN, seed) | {
        "iteration": iteration, "num_rollouts": 64 * iteration, "kl": kl, "reward": 2 * judge, "judge": judge,
        "judge_gain_error": 0.05, "win_rate": 0.6, "distinct2": 0.8, "num_prompts": 256, "machine": "a machine", "revision": "abc",
    }  # fmt: skip


def seed_rows(ours: list[tuple[float, float]], trl: list[tuple[float, float]], seed: int = 3) -> list[dict[str, Any]]:
    """The SFT model at judge score 1, and the (KL, judge score) of both systems after 2 and 4 iterations."""
    rows = [row(SFT, 0, 0.0, 1.0, seed)]
    for system, points in ((OURS_ARM.name, ours), (TRL.name, trl)):
        rows += [row(system, 2 * number, kl, judge, seed) for number, (kl, judge) in enumerate(points, start=1)]
    return rows


OURS, PEER = [(1.0, 1.5), (4.0, 2.1)], [(0.5, 1.1), (2.0, 1.4)]


def test_a_curve_starts_with_the_sft_model() -> None:
    rows = seed_rows(OURS, PEER)[::-1]
    assert [r["iteration"] for r in curve_of(rows, "ours", SFT)] == [0, 2, 4]
    assert curve_of(rows[:-1], "ours", SFT) == []
    assert curve_of(rows, TRL_OWN.name, SFT) == []


@pytest.mark.parametrize(
    ("level", "judge"), [(0.0, 1.0), (0.5, 1.25), (1.0, 1.5), (2.0, 1.7), (4.0, 2.1), (4.01, None)]
)
def test_a_score_is_read_at_a_kl(level: float, judge: float | None) -> None:
    found = read_at(curve_of(seed_rows(OURS, PEER), "ours", SFT), "kl", level, "judge")
    assert found == (judge if judge is None else pytest.approx(judge))


def test_the_first_time_counts_where_a_curve_falls_again() -> None:
    points = [{"kl": kl, "judge": judge} for kl, judge in ((0, 0), (2, 1), (1, 5), (3, 3))]
    assert read_at(points, "kl", 1.5, "judge") == pytest.approx(0.75)  # not on the way back, nor on the second rise
    assert read_at(points, "kl", 2.5, "judge") == pytest.approx(3.5)  # from (1, 5) to (3, 3)
    assert read_at(points, "judge", 4, "kl") == pytest.approx(1.25)


def test_both_systems_are_compared_at_the_kl_that_both_reach() -> None:
    rows = seed_rows(OURS, PEER)
    ours, trl = (curve_of(rows, name, SFT) for name in ("ours", "TRL"))
    assert common_kl([ours, trl]) == 2.0
    pair = compare(3, ours, trl)
    assert pair.judge == pytest.approx((0.7, 0.4))
    assert pair.gain == pytest.approx(0.3)
    assert pair.reward == pytest.approx((1.4, 0.8))
    assert pair.judge_half == pytest.approx((0.5, 0.2))
    assert pair.rollouts == pytest.approx(0.8 * 128)  # judge 1.4 on the way from 1 to 1.5
    assert pair.share == pytest.approx(0.4)


def test_a_score_that_is_never_reached_has_no_rollouts() -> None:
    rows = seed_rows(PEER, OURS)
    pair = compare(3, *(curve_of(rows, name, SFT) for name in ("ours", "TRL")))
    assert pair.rollouts is None and math.isinf(pair.share)


@pytest.mark.parametrize(
    ("ours", "trl", "verdicts"),
    [
        (OURS, PEER, ["met", "met"]),
        (PEER, OURS, ["missed", "missed"]),
        ([(1.0, 1.2), (2.0, 1.5)], [(1.0, 1.1), (2.0, 1.4)], ["met", "missed"]),
    ],
)
def test_goals_are_met_or_missed(
    ours: list[tuple[float, float]], trl: list[tuple[float, float]], verdicts: list[str]
) -> None:
    text = tables({3: seed_rows(ours, trl)}, PLAN.params(3))
    assert re.findall(r"\*\*(met|missed)\*\*", text) == verdicts


def test_the_page_says_what_is_missing() -> None:
    whole, half = seed_rows(OURS, PEER), seed_rows(OURS, PEER[:1], seed=4)
    text = tables({3: whole, 4: half, 5: []}, PLAN.params(3))
    assert "TRL on seed 4 after 128 rollouts, ours on seed 5, TRL on seed 5" in text
    assert "2 of 3 seeds measured" in text
    assert "| 3 | 256 | 2.00 | +0.700 | +0.400 | +0.500 | +0.200 | +1.400 | +0.800 | +0.400 | 102 |" in text
    assert "| 4 | 128 | 0.50 | +0.250 | +0.100 | +0.125 | +0.050 | +0.500 | +0.200 | +0.100 | 26 |" in text
    assert "Not measured yet" not in tables({3: whole}, PLAN.params(3))
    assert tables({4: half[:-1]}, PLAN.params(3)).count(": not measured.") == 2  # both goals


def test_the_mean_of_several_seeds_has_its_spread() -> None:
    better = [(1.0, 1.7), (4.0, 2.3)]
    text = tables({3: seed_rows(OURS, PEER), 4: seed_rows(better, PEER, seed=4)}, PLAN.params(3))
    assert "difference +0.400 ± 0.141; on 2 of 2 seeds" in text


def test_page_and_plot_are_written(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "LEARNING.md", tmp_path / "benchmarks")
    write_page({3: seed_rows(OURS, PEER)}, PLAN.params(3), root=tmp_path)
    assert "+0.400 | 102 |" in (tmp_path / "benchmarks" / "LEARNING.md").read_text()
    assert (tmp_path / "benchmarks" / "learning.svg").read_text().count("<svg") == 1


def test_rows_of_other_settings_are_not_taken() -> None:
    rows = seed_rows(OURS, PEER) + seed_rows(OURS, PEER, seed=4)
    assert rows_of(rows, PLAN, 3) == rows[:5]
    assert rows_of(rows, Plan(num_iterations=6, every=2, num_prompts=256), 3) == []
    assert rows_of(rows, Plan(num_iterations=4, every=1, num_prompts=256), 3) == rows[:5]


def test_rows_of_other_models_are_not_mixed_in() -> None:
    old, new = ([each | {"start": start} for each in seed_rows(OURS, PEER)] for start in ("old", "new"))
    assert rows_of([*old, *new[:2]], PLAN, 3) == new[:2]
    assert rows_of([*old, *new[:2]], PLAN, 3, "old") == old
    assert rows_of(old, PLAN, 3, "new") == []


def test_trl_gets_the_settings_of_the_params_file() -> None:
    ppo, job = PLAN.params(3).ppo, settings_of(TRL, PLAN, 3)
    assert (job["kl_coef"], job["learning_rate"], job["temperature"]) == (0.2, 1e-4, 0.7)
    assert (job["rollouts"], job["minibatch"], job["epochs"], job["response"]) == (64, 32, 2, 16)
    # 16 steps, 2 of warm-up at 1/3 and 2/3 of the peak: the mean of the 4 steps of the first iteration is 3/4.
    assert ppo.training.warmup_fraction == 0.1
    assert job["rate_factors"] == [0.75, 1.0, 1.0, 1.0]
    own = settings_of(TRL_OWN, PLAN, 3)
    assert (own["minibatch"], own["epochs"], own["learning_rate"], own["betas"]) == (64, 4, 3e-6, [0.9, 0.999])
    assert own["rate_factors"] == [1.0, 0.75, 0.5, 0.25]
    assert own["rollouts"] * own["iterations"] == job["rollouts"] * job["iterations"]


class Programs:
    """Stands in for the programs that train and measure: policies are empty folders. The first evaluation can die after one row."""

    def __init__(self, *, dies: bool) -> None:
        self.started: list[str] = []
        self.dies = dies

    def start(self, _python: Path, module: str, job: Path, _log: Path) -> Iterator[Any]:
        self.started.append(module)
        if module != "evaluate":
            for iteration in (2, 4):
                (job.parent / f"iteration-{iteration:02d}").mkdir(exist_ok=True)
            return
        names = ("kl", "reward", "judge", "win_rate", "distinct2", "judge_gain_error", "num_prompts")
        for policy in json.loads(job.read_text())["policies"]:
            yield policy | dict.fromkeys(names, 0.5)
            if self.dies:
                self.dies = False
                raise KeyboardInterrupt


def measure(programs: Programs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """System and iteration of every row after one start of the program."""
    artifacts = Artifacts(run="quick-3", folders={name: folder / name for name in OUTPUTS}, start="s")
    monkeypatch.setattr(program, "start", programs.start)
    monkeypatch.setattr(program, "python_of", lambda _environment: Path("python"))
    monkeypatch.setattr(program, "artifacts_of", lambda _seed, _runs: artifacts)
    monkeypatch.setattr(program, "training_job", lambda arm, *_: {"arm": arm.name})
    rows, work = folder / "rows.jsonl", folder / "work"
    program.measure_seed(3, [OURS_ARM, TRL], PLAN, runs=folder, work=work, rows=rows, trains=True)
    return [(row["system"], row["iteration"]) for row in read_rows(rows)]


ALL_ROWS = [(SFT, 0), ("ours", 2), ("ours", 4), ("TRL", 2), ("TRL", 4)]


def test_a_finished_row_is_never_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(dies=False)
    assert measure(programs, tmp_path, monkeypatch) == ALL_ROWS
    assert programs.started == ["ours_ppo", "evaluate", "trl_ppo", "evaluate"]
    assert not list(tmp_path.glob("work/**/iteration-*"))  # the weights of measured policies are gone
    assert measure(programs, tmp_path, monkeypatch) == ALL_ROWS
    assert len(programs.started) == 4


def test_a_killed_evaluation_goes_on_without_training_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(dies=True)
    with pytest.raises(KeyboardInterrupt):
        measure(programs, tmp_path, monkeypatch)
    assert [row["system"] for row in read_rows(tmp_path / "rows.jsonl")] == [SFT]
    assert measure(programs, tmp_path, monkeypatch) == ALL_ROWS
    assert programs.started == ["ours_ppo", "evaluate", "evaluate", "trl_ppo", "evaluate"]
