"""Rows, tables, goals and lengths of the comparison with peers; nothing is trained and nothing downloaded."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import __main__ as program
from benchmarks.peers import ceiling, chat_lengths, environments, growth, processes
from benchmarks.peers import settings as s
from benchmarks.peers.flops import Shape, Work, ppo_flops
from benchmarks.peers.goals import GOALS
from benchmarks.peers.measure import Marks, peak_bytes
from benchmarks.peers.processes import Arm
from benchmarks.peers.rows import FIELDS, RESULTS, Row, load_rows, make_row, save_rows
from benchmarks.peers.tables import section
from benchmarks.record import ROOT, replace_section

SHAPE = Shape(hidden=4, intermediate=8, layers=3, key_value=2, vocabulary=10)


def process(*intervals: list[float], **changes: Any) -> dict[str, Any]:
    found = {
        "version": "x 1.0",
        "samples": 32,
        "tokens": 1024,
        "intervals": list(intervals),
        "peak_bytes": 2**30,
        "load": 0.5,
    }
    return found | changes


def row(system: str, setting: str, cpu: float, **more: Any) -> Row:
    return make_row(system, setting, [process([cpu, cpu / 2])], **more)


def test_row_is_median_and_range_over_all_processes() -> None:
    found = make_row(
        "ours", "a setting", [process([3.0, 2.0], [9.0, 5.0]), process([4.0, 3.0], peak_bytes=2**31, load=1.5)]
    )
    assert {name: type(value) for name, value in found.items()} == FIELDS
    assert [found[name] for name in ("cpu_seconds", "cpu_seconds_min", "cpu_seconds_max", "wall_seconds", "n")] == [
        4,
        3,
        9,
        3,
        3,
    ]
    assert (found["peak_bytes"], found["load"], found["samples"]) == (2**31, 1.5, 32.0)


def test_saved_rows_replace_all_or_only_the_same_system_and_setting(tmp_path: Path) -> None:
    save_rows("x", [row("ours", "a", 1.0), row("TRL", "a", 2.0)], keep_others=False, folder=tmp_path)
    save_rows("x", [row("TRL", "a", 3.0), row("TRL", "b", 4.0)], keep_others=True, folder=tmp_path)
    found = [(r["system"], r["setting"], r["cpu_seconds"]) for r in load_rows("x", tmp_path)]
    assert found == [("ours", "a", 1.0), ("TRL", "a", 3.0), ("TRL", "b", 4.0)]
    save_rows("x", [row("ours", "c", 5.0)], keep_others=False, folder=tmp_path)
    assert len(load_rows("x", tmp_path)) == 1
    assert load_rows("never measured", tmp_path) == []


def test_section_has_a_row_per_system_and_says_which_goals_are_missed() -> None:
    rows = [
        row("ours", s.RAGGED, 16.0),
        row("TRL", s.RAGGED, 64.0),
        row("ours", s.FIXED, 32.0),
        row("TRL", s.FIXED, 40.0),
    ]
    text = section("ppo", {"ppo": rows})
    assert f"| {s.RAGGED} | ours | 2.00 | 64.0 | 16.0 (16.0 to 16.0, 1) | 8.0 | 1.00 |" in text.splitlines()
    assert text.index("| ours | 1.00") < text.index("| TRL | 0.80")
    assert "at least twice TRL's samples per CPU second: met, 4.00 times." in text
    assert "Peak memory at equal settings: at most half of TRL's: **missed**, 1.00 times." in text
    assert "10 times TRL's samples per CPU second at fixed lengths in fp32: not measured" in text
    assert "Not measured on a GPU." in text


def test_section_shows_the_phases_of_an_iteration() -> None:
    found = make_row("ours", s.FIXED, [process([3.0, 2.0], phases={"generate": 0.25, "update": 0.75})])
    assert f"- ours; {s.FIXED}: generate 25%, update 75%" in section("ppo", {"ppo": [found]}).splitlines()


def test_goal_in_seconds_holds_for_its_machine_only() -> None:
    def text(machine: str) -> str:
        return section("ppo", {"ppo": [row("ours", s.FIXED, 30.0) | {"machine": machine}]})

    assert "36 CPU seconds per iteration on an AMD EPYC (was 43.2): met, 30.0 CPU seconds." in text(
        "AMD EPYC 9B14, 2 cores"
    )
    assert "36 CPU seconds per iteration on an AMD EPYC (was 43.2): not measured" in text("Another, 2 cores")


def test_share_of_the_ceiling_is_a_ratio_of_rates() -> None:
    products = row(ceiling.SYSTEM, ceiling.LAYERS.format("fp32"), 2.0, gflop=200.0)
    ours = row("ours", s.FIXED, 40.0, gflop=2000.0)
    assert ceiling.share_of_ceiling(ours, [products], "fp32") == pytest.approx(0.5)
    assert ceiling.share_of_ceiling(ours, [products], "bf16") is None
    assert "| 2000 | 50.0 | 50% |" in section("ceiling", {"ceiling": [products], "ppo": [ours]})


def test_readme_has_one_section_for_each_benchmark(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    for name in program.ALL_ARMS:
        replace_section(copy, name, "| a table |")  # exits unless there is exactly one
    assert copy.read_text(encoding="utf-8").count("| a table |") == len(program.ALL_ARMS)
    assert set(GOALS) == set(program.ROUNDS) == set(program.ITERATIONS) == set(program.ALL_ARMS)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_rows_have_every_field_and_are_those_of_the_readme(path: Path) -> None:
    assert path.stem in program.ALL_ARMS
    rows = json.loads(path.read_text(encoding="utf-8"))
    for each in rows:
        assert {name: type(each[name]) for name in FIELDS} == FIELDS
        assert each["cpu_seconds_min"] <= each["cpu_seconds"] <= each["cpu_seconds_max"]
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    expected = section(path.stem, {name: load_rows(name) for name in program.ALL_ARMS})
    assert f"<!-- {path.stem} -->\n{expected}\n<!-- /{path.stem} -->" in readme, (
        "run python -m benchmarks.peers --tables"
    )


def test_chat_lengths_are_the_drawn_ones_with_a_long_tail() -> None:
    rows = json.loads(chat_lengths.PATH.read_text(encoding="utf-8"))
    assert rows == chat_lengths.draw()
    totals = sorted(map(sum, rows))
    assert len(rows) == 256 and all(len(each) == 2 and min(each) >= 8 for each in rows)
    assert 550 < statistics.mean(totals) < 580
    assert statistics.median(totals) < 480 and totals[-1] <= 2048 and totals[-8] > 1500


def test_selected_chats_are_spread_over_all_lengths() -> None:
    totals = [sum(each) for each in chat_lengths.load(8)]
    assert len(totals) == 8 and totals == sorted(totals)
    assert 500 < statistics.mean(totals) < 620
    ids = chat_lengths.random_ids([[3, 2]])
    assert [len(part) for part in ids[0]] == [3, 2] and ids == chat_lengths.random_ids([[3, 2]])


def test_flops_of_one_row_by_hand() -> None:
    # Weights of a layer: 4 * (2 * 4 + 2 * 2 + 3 * 8) = 144. One row of 2 + 3 tokens: 2 * 144 * 5 + 2 * 4 * 25 = 1640. Head: 2 * 40 * 3.
    layer, head = 1640.0, 240.0
    assert SHAPE.layer_forward(5) == layer
    generation, score = 3 * layer + head, 3 * 3 * layer + head
    update = 3 * 3 * layer + 3 * head + 3 * 3 * layer
    assert ppo_flops(SHAPE, [[2, 3]], Work(epochs=2)) == generation + score + 2 * update
    frozen = Work(frozen=2, trains_critic_layers=False, generates=False)
    assert ppo_flops(SHAPE, [[2, 3]], frozen) == 2 * layer + 2 * layer + head + 3 * layer + 2 * head


def test_marks_give_the_time_between_them() -> None:
    marks = Marks()
    for _ in range(4):
        marks.mark()
    assert len(marks.intervals()) == 3 and all(wall >= 0 for _, wall in marks.intervals())
    marks.drop_first()
    assert len(marks.intervals()) == 2
    assert peak_bytes() > 2**20


def test_every_point_of_growth_is_its_own_setting() -> None:
    settings = [arm.setting for arm in growth.arms(1)]
    assert len(set(settings)) == len(settings) == sum(map(len, growth.AXES.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "There is no benchmark speed; choose from ceiling, ppo, chat, train, rollout, growth, or all."),
        (["ppo", "--rounds", "-1"], "--rounds and --iterations are numbers of at least 1."),
    ],
)
def test_bad_arguments_end_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as error:
        program.parse(arguments)
    assert error.value.code == message


def test_process_that_fails_is_named_with_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "CACHE", tmp_path)
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="x: ours failed .*No module named .*failed.log has its output"):
        list(processes.measure("x", [Arm(system="ours", setting="a", module="no_such_program", job={})], 1))


def test_every_process_gives_the_rows_measured_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = iter([1.0, 10.0, 3.0, 30.0])
    started: list[str] = []

    def stand_in(name: str, arm: Arm, python: Path) -> dict[str, Any]:
        started.append(arm.system)
        return process([next(cpu), 1.0])

    monkeypatch.setattr(processes, "_run", stand_in)
    arms = [Arm(system=system, setting="a", module="m", job={}) for system in ("ours", "TRL")]
    found = [
        [(each["system"], each["cpu_seconds"], each["n"]) for each in rows] for rows in processes.measure("x", arms, 2)
    ]
    assert started == ["ours", "TRL", "ours", "TRL"]
    assert found == [
        [("ours", 1.0, 1)],
        [("ours", 1.0, 1), ("TRL", 10.0, 1)],
        [("ours", 2.0, 2), ("TRL", 10.0, 1)],
        [("ours", 2.0, 2), ("TRL", 20.0, 2)],
    ]


def test_missing_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "CACHE", tmp_path)
    monkeypatch.setattr(environments, "_wheel_folder", lambda: str(tmp_path))
    monkeypatch.setattr(environments.shutil, "which", lambda _: "/bin/false")
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"trl-1.12 could not be installed .*; check the network and run again\.$"):
        environments.python_of(environments.TRL_PPO)
    assert environments.python_of(environments.OURS) == Path(sys.executable)
