"""Rows, tables and plot of the study."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import benchmarks.study as study
import benchmarks.study_report as report
from benchmarks.record import ROOT, append_row, read_rows, replace_section, settings_digest
from benchmarks.report import write_tables
from benchmarks.study import Run, fresh_runs, planned_runs, select_samples
from pipelines.settings import dump_yaml, load_params


def row(arm: str, seed: int = 0, **changes: float) -> dict[str, Any]:
    numbers = {
        "num_prompts": 512, "win_rate": 0.75, "win_rate_low": 0.7, "win_rate_high": 0.8,
        "num_matched": 40, "win_rate_matched": 0.6, "win_rate_matched_low": 0.5, "win_rate_matched_high": 0.7,
        "win_rate_cut": 0.72, "win_rate_cut_low": 0.66, "win_rate_cut_high": 0.78, "kl": 4.0,
        "judge_score_sft": 0.1, "judge_score_ppo": 0.85, "reward_sft": 0.0, "reward_ppo": 1.25,
        "distinct2_sft": 0.8, "distinct2_ppo": 0.72, "length_sft": 16.0, "length_ppo": 12.5,
        "eos_rate_sft": 0.9, "eos_rate_ppo": 0.8, "judge_accuracy": 0.75, "reward_model_accuracy": 0.8,
    }  # fmt: skip
    gib = changes.pop("gib", 2.5)
    seconds = changes.pop("seconds", 330.0)
    training = [
        {"iteration": i, "num_rollouts": 64 * i, "reward": 0.1 * i, "judge_score": 0.1, "kl": 0.5 * i, "length": 9, "eos_rate": 0.9}
        for i in (0, 4)
    ]  # fmt: skip
    return {
        "arm": arm,
        "seed": seed,
        "seconds": seconds,
        "machine": "a machine",
        "promoted": True,
        "stages": {"sft": {"peak_memory_bytes": 2**30}, "ppo": {"peak_memory_bytes": gib * 2**30}},
        "evaluation_all": numbers | changes,
        "training": training,
        "samples": {"At random": [{"prompt": "A | B", "sft": "is\nso", "ppo": "was", "gain": 0.5}]},
    }


@pytest.mark.parametrize(
    ("change", "met"),
    [
        ({}, True),
        ({"win_rate_low": 0.601}, True),
        ({"win_rate_low": 0.6}, False),
        ({"kl": 6.0}, True),
        ({"kl": 6.01}, False),
        ({"distinct2_ppo": 0.68}, True),  # 85% of 0.8
        ({"distinct2_ppo": 0.679}, False),
        ({"gib": 3.0}, True),
        ({"gib": 3.01}, False),
    ],
)
def test_bounds_of_the_quick_preset(change: dict[str, float], met: bool) -> None:
    assert report.meets_bounds(row("quick", **change)) is met


def test_missed_bound_is_reported_as_missed() -> None:
    rows = [row("quick", 0), row("quick", 1, kl=7.0), row("full", 0), row("full", 1, win_rate_low=0.55)]
    text = report.bounds_text(rows)
    assert "at most 3 GiB: **met on 1 of 2**" in text
    assert "seed of full: interval above 0.6: **met on 1 of 2**" in text
    assert "met on 1 of 2; at most 6 minutes, met on 2 of 2" in text


def test_arm_table_has_mean_range_and_lowest_interval() -> None:
    rows = [row("quick", 0), row("quick", 1, win_rate=0.65, win_rate_low=0.61, win_rate_high=0.69, seconds=390.0)]
    (line,) = (line for line in report.arm_table(rows).splitlines() if line.startswith("| quick"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "quick", "2", "0.700 (0.650 to 0.750)", "[0.610, 0.690]", "0.720 (0.720 to 0.720)", "4.00 (4.00 to 4.00)",
        "90% (90% to 90%)", "90% to 80%", "6:00 (5:30 to 6:30)", "2.5 GiB", "promotes 2 of 2",
    ]  # fmt: skip


def test_run_table_has_all_numbers_of_a_run() -> None:
    (line,) = (line for line in report.run_table([row("full", 2)]).splitlines() if line.startswith("| full"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "full", "2", "0.750 [0.700, 0.800]", "0.600 [0.500, 0.700] of 40", "0.720 [0.660, 0.780]", "4.00", "+0.75", "+1.25",
        "0.800, 0.720", "16.0, 12.5", "90%, 80%", "5:30", "2.5 GiB", "promoted",
    ]  # fmt: skip


def test_model_output_does_not_break_the_table() -> None:
    assert "| A \\| B | is so | was | +0.50 |" in report.sample_tables(row("quick"))


def test_plot_shows_every_arm_and_is_reproducible(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    rows = [row("quick", 0), row("quick", 1), row("full"), row("small KL")]
    report.plot(rows, path)
    first = path.read_bytes()
    report.plot(rows, path)
    assert path.read_bytes() == first  # so that a commit of the plot shows only changed numbers
    for arm in ("quick", "full", "small KL"):
        assert report.COLORS[arm].encode() in first


def test_study_runs_every_preset_on_every_seed_and_the_rejected_arm_once() -> None:
    found = [(run.arm.name, run.seed) for run in planned_runs(2)]
    assert found == [("quick", 0), ("quick", 1), ("small KL", 0), ("full", 0), ("full", 1)]


def test_fresh_seeds_are_those_after_the_ones_that_chose_settings(tmp_path: Path) -> None:
    """Their table has a place in the document, which has no other rows than theirs."""
    assert [(run.arm.name, run.seed) for run in fresh_runs(2)] == [("quick", 3), ("quick", 4)]
    assert not {run.seed for run in planned_runs(3)} & {run.seed for run in fresh_runs(3)}
    (tmp_path / "docs").mkdir()
    shutil.copyfile(ROOT / "docs" / "results.md", tmp_path / "docs" / "results.md")
    report.write_fresh_seeds([row("quick", 3)], tmp_path)
    before, written = ((root / "docs" / "results.md").read_text(encoding="utf-8") for root in (ROOT, tmp_path))
    table = report.run_table([row("quick", 3)])
    assert table in written and table not in before
    assert written.split("<!-- fresh seeds -->")[0] == before.split("<!-- fresh seeds -->")[0]


def test_goal_on_fresh_seeds_needs_win_rate_kl_and_diversity() -> None:
    def with_numbers(win_rate: float, kl: float, distinct: float) -> dict[str, Any]:
        numbers = {"win_rate": win_rate, "kl": kl, "distinct2_sft": 0.8, "distinct2_ppo": 0.8 * distinct}
        return row("quick") | {"evaluation_all": row("quick")["evaluation_all"] | numbers}

    rows = [with_numbers(*n) for n in ((0.78, 4.0, 0.91), (0.77, 3.0, 0.95), (0.9, 4.1, 0.95), (0.9, 3.0, 0.89))]
    assert report.goal_text(rows).endswith("**met on 1 of 4**.")


def test_run_is_finished_when_a_row_has_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows.jsonl")
    first, second = (Run(study.ARMS[0], seed) for seed in (0, 1))
    digest = settings_digest(first.params)
    append_row(study.ROWS, {"arm": "quick", "seed": 1, "settings_digest": digest})  # another seed
    assert first.row() is None
    append_row(study.ROWS, {"arm": "quick", "seed": 0, "settings_digest": "digest of other settings"})
    assert first.row() is None
    finished = {"arm": "quick", "seed": 0, "settings_digest": digest, "seconds": 1.0}
    append_row(study.ROWS, finished)
    assert first.row() == finished
    assert second.row() is None
    assert len(read_rows(study.ROWS)) == 3  # rows of other settings are kept


def test_run_that_differs_only_in_ppo_reuses_the_earlier_stages(tmp_path: Path) -> None:
    params = Run(study.ARMS[0], 0).params
    for name, status, settings in (
        ("a-failed", "failed", []),
        ("b-other-data", "succeeded", ["data.min_rating_gap=2"]),
        ("c-other-seed", "succeeded", ["seed=1"]),
        ("d-other-ppo", "succeeded", ["ppo.kl_coef=0.5"]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.yaml").write_text(dump_yaml(load_params(study.PARAMS, ["seed=0", *settings])))
        (tmp_path / name / "summary.json").write_text(json.dumps({"status": status}))
        found = study.find_reusable_run(params, tmp_path)
        assert (found.name if found else None) == (name if name == "d-other-ppo" else None)
    (tmp_path / "e-never-finished").mkdir()
    assert study.find_reusable_run(params, tmp_path) == tmp_path / "d-other-ppo"


def test_samples_are_those_of_the_report_of_the_run() -> None:
    gains = [float((7 * i) % 30) for i in range(30)]
    lines = [
        {"prompt": f"p{i}", "sft": {"response": "s", "judge_score": 1.0}, "ppo": {"response": "o", "judge_score": 1.0 + g}}
        for i, g in enumerate(gains)
    ]  # fmt: skip
    found = select_samples(lines, 0)
    assert [len(pairs) for pairs in found.values()] == [5, 5, 10]
    assert [pair["gain"] for pair in found["Largest gains"]] == [29, 28, 27, 26, 25]
    assert found["Largest losses"][0] == {"prompt": "p0", "sft": "s", "ppo": "o", "gain": 0.0}


def test_replace_section_changes_only_the_text_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    replace_section(page, "x", "new\\1")
    assert page.read_text() == "a\n<!-- x -->\nnew\\1\n<!-- /x -->\nb\n"


def test_replace_section_fails_without_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has 0 sections named x; expected exactly one"):
        replace_section(page, "x", "new")


def test_documents_hold_the_tables_and_the_plot_of_the_measured_rows(tmp_path: Path) -> None:
    pages = ("README.md", "docs/results.md", "components/README.md", "components/ppo/README.md")
    pictures = ("movie_study.svg", "movie_health.svg")
    for name in (*pages, *(f"benchmarks/{picture}" for picture in pictures)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    rows = [row for run in planned_runs(3) if (row := run.row()) is not None]
    assert len(rows) == 7
    write_tables([row for row in rows if row["arm"] == "quick"], tmp_path)
    report.write_report(rows, tmp_path)
    for name in pages:
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), name
    for picture in pictures:
        committed, drawn = (
            re.findall(r">([^<]+)</text>", (root / "benchmarks" / picture).read_text(encoding="utf-8"))
            for root in (ROOT, tmp_path)
        )
        assert len(drawn) > 20
        assert committed == drawn
