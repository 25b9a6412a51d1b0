"""`kfp-rlhf sweep` on this machine: points that share their equal stages bit for bit, and nothing else."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import KINDS, sha256_of
from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.local import sweep as local_sweep
from pipelines.local.sweep import create_sweep, run_sweep
from pipelines.local.sweep_results import PointResult, advice, champion_of, read_results, sweep_table
from pipelines.sweep import parse_grid, plan_points
from tests.support.resident import Resident
from tests.support.toy_pipeline import toy_params, write_data, write_params
from tests.support.verifiable import verifiable_params


@pytest.fixture
def toy(tmp_path: Path, tiny_model: Path) -> Path:
    return write_params(tmp_path / "toy.yaml", toy_params(tiny_model, write_data(tmp_path)))


def make_sweep(toy: Path, folder: Path, grid: str = "ppo.kl_coef=0.1,0.2,0.3") -> list[str]:
    points = plan_points(toy, [], [parse_grid(grid)])
    create_sweep(points, folder)
    return [point.name for point in points]


def test_plan_is_written_before_anything_runs(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    names = make_sweep(toy, folder)
    assert names == ["1-kl_coef-0.1", "2-kl_coef-0.2", "3-kl_coef-0.3"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "sweep.json"]
    assert yaml.safe_load((folder / names[1] / "params.yaml").read_text())["ppo"]["kl_coef"] == 0.2
    assert [(result.name, result.state) for result in read_results(folder)] == [(name, "waiting") for name in names]


def test_sweep_is_not_begun_if_an_input_of_its_last_point_is_missing(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="point 2-path-.*missing.jsonl"):
        make_sweep(toy, tmp_path / "sweep", f"data.prompts.path={tmp_path}/prompts.jsonl,{tmp_path}/missing.jsonl")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("file", ["sweep.json", "notes.txt"])
def test_used_directory_is_refused(toy: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / file).write_text("{}")
    with pytest.raises(InputError, match="already"):
        make_sweep(toy, tmp_path / "sweep")
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == [file]


def write_summary(run: Path, **changes: Any) -> dict[str, Any]:
    """A run directory with a summary, as a run leaves it."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"run_id": run.name, "tracking_uri": "", "directory": str(run)}))
    numbers = {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65, "kl": 1.5}
    summary = {
        "status": "succeeded", "promoted": True, "reason": "it won", "evaluation": numbers, "open": {}, "stages": {}, **changes
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    return summary


class Runs:
    """Stands in for the runs of points: the n-th one ends as outcomes says, and leaves a summary."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *outcomes: str | InputError) -> None:
        self.outcomes, self.calls, self.donors = list(outcomes), list[tuple[str, str]](), list[list[str]]()
        monkeypatch.setattr(local_sweep, "run_pipeline", lambda params, run, **given: self.end("run", run, **given))
        monkeypatch.setattr(local_sweep, "resume_pipeline", lambda run, **given: self.end("resume", run, **given))

    def end(self, how: str, run: Path, *, donors: list[Path], **_: Any) -> dict[str, Any]:
        self.calls.append((how, run.name[0]))
        self.donors.append([donor.name[0] for donor in donors])
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, InputError):
            raise outcome
        status = "succeeded" if outcome == "succeeded" else "failed"
        return write_summary(
            run, status=status, reason=outcome, evaluation={} if status == "failed" else {"win_rate": 0.5}
        )


CONSOLE = Console(quiet=True)


def test_failed_point_does_not_end_the_sweep_and_runs_again_on_resume(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    names = make_sweep(toy, folder, "ppo.kl_coef=0.1,0.2,0.3,0.4")
    runs = Runs(monkeypatch, "succeeded", "ppo: nan", InputError("disk is full"), "succeeded", "succeeded", "succeeded")
    assert run_sweep(folder, CONSOLE) == {names[1]: "ppo: nan", names[2]: "disk is full"}
    assert runs.calls == [("run", "1"), ("run", "2"), ("run", "3"), ("run", "4")]
    assert runs.donors[1] == ["1", "3", "4"]  # those that have not run have nothing to share
    assert {result.name: result.state for result in read_results(folder)} == dict(
        zip(names, ["succeeded", "failed", "waiting", "succeeded"], strict=True)
    )
    assert run_sweep(folder, CONSOLE) == {}
    assert runs.calls[4:] == [("resume", "2"), ("run", "3")]
    assert run_sweep(folder, CONSOLE) == {}
    assert len(runs.calls) == 6


def test_interruption_ends_the_sweep(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sweep"
    make_sweep(toy, folder)
    runs = Runs(monkeypatch, "succeeded", "interrupted")
    assert list(run_sweep(folder, CONSOLE).values()) == ["interrupted"]
    assert runs.calls == [("run", "1"), ("run", "2")]


def test_moved_sweep_and_folder_without_a_sweep_are_refused(toy: Path, tmp_path: Path) -> None:
    make_sweep(toy, tmp_path / "sweep")
    (tmp_path / "sweep").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"was moved from {tmp_path}/sweep"):
        run_sweep(tmp_path / "elsewhere", CONSOLE)
    with pytest.raises(InputError, match="contains no sweep"):
        run_sweep(tmp_path, CONSOLE)
    (tmp_path / "elsewhere" / "sweep.json").write_text('{"points": [1]}')
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path / "elsewhere")


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A sweep of five points, of which three have an evaluation."""
    folder = tmp_path / "sweep"
    rates = {"1": 0.6, "2": 0.7, "3": 0.9}
    stages = {
        "sft": {"seconds": 60.0, "shared_with": "1-x", "reused": True},
        "ppo": {"seconds": 90.0, "shared_with": "", "reused": False},
    }
    entries = []
    for number in "12345":
        name = f"{number}-x"
        entries.append({"name": name, "settings": {"ppo.kl_coef": f"0.{number}", "judge.training.kl_coef": "7"}})
        if number in rates:
            numbers = {"win_rate": rates[number], "win_rate_low": 0.55, "win_rate_high": 0.95, "kl": 1.5}
            where = {"tracking": "mlflow ui"}
            write_summary(folder / name, evaluation=numbers, promoted=number != "3", stages=stages, open=where)
    write_summary(folder / "4-x", status="failed", reason="ppo: nan", evaluation={}, stages=stages)
    (folder / "sweep.json").write_text(json.dumps({"directory": str(folder), "points": entries}))
    return folder


def test_results_are_in_the_order_of_promotion_and_win_rate(ended: Path) -> None:
    results = read_results(ended)
    assert [(result.name[0], result.decision or result.state) for result in results] == [
        ("2", "promoted"), ("1", "promoted"), ("3", "rejected"), ("4", "failed"), ("5", "waiting")
    ]  # fmt: skip
    assert results[0].seconds == 90.0 and results[0].shared == ("sft",)
    assert results[3] == PointResult(
        name="4-x", run=str(ended / "4-x"), settings=results[3].settings, state="failed", reason="ppo: nan"
    )


def test_table_has_settings_intervals_and_decisions(ended: Path) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(sweep_table(read_results(ended)))
    lines = capture.get().splitlines()
    header, first = (
        [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in (lines[2], lines[4])
    )
    assert header == [
        "point", "ppo.kl_coef", "training.kl_coef", "decision", "win rate", "KL", "time", "shared"
    ]  # fmt: skip
    assert first == ["2", "0.2", "7", "promoted", "0.700 [0.550, 0.950]", "1.5", "1:30", "1 stage"]


def test_advice_names_the_champion_and_warns_of_the_choice_on_one_split(ended: Path) -> None:
    champion, warning, further = advice(read_results(ended), "kfp-rlhf")
    assert champion.startswith("Champion: 2-x (of the promoted points, ")
    assert "best of 3" in warning and f"kfp-rlhf run {ended}/2-x/params.yaml --set seed=N" in warning
    assert f"kfp-rlhf export {ended}/2-x --to my-model" in further
    assert advice([], "kfp-rlhf") == []


def point(name: str, low: float | None, rate: float | None, kl: float = 1.0, decision: str = "promoted") -> PointResult:
    return PointResult(
        name=name, run=name, settings={}, state="succeeded", decision=decision, reason="too far", win_rate=rate, win_rate_low=low, kl=kl
    )  # fmt: skip


@pytest.mark.parametrize(
    ("points", "champion"),
    [
        ([point("a", 0.51, 0.9), point("b", 0.6, 0.7)], "b"),  # the lower end decides, not the rate
        ([point("a", 0.6, 0.7), point("b", 0.6, 0.8)], "b"),
        ([point("a", 0.6, 0.8, kl=3.0), point("b", 0.6, 0.8, kl=2.0)], "b"),
        ([point("a", 0.9, 0.95, decision="rejected"), point("b", 0.51, 0.6)], "b"),
        ([point("a", 0.9, 0.95, decision="rejected")], None),
        ([point("a", None, None)], None),
        ([], None),
    ],
)
def test_champion_is_the_promoted_point_with_the_highest_lower_end(points: list[PointResult], champion: str) -> None:
    for order in (points, points[::-1]):
        found = champion_of(order)
        assert (found.name if found else None) == champion


def test_without_a_promoted_point_there_is_no_champion() -> None:
    (line,) = advice([point("a", 0.4, 0.5, decision="rejected"), point("b", 0.3, 0.4, decision="rejected")], "kfp-rlhf")
    assert line == "No champion: no point was promoted. The best one, a, was not because: too far."


def test_command_shows_the_table_and_json(ended: Path) -> None:
    shown = CliRunner().invoke(cli, ["sweep", "--table", str(ended)])
    assert shown.exit_code == 0 and "5 points" in shown.output
    content = json.loads(CliRunner().invoke(cli, ["sweep", "--table", str(ended), "--json"]).stdout)
    points = content["points"]
    assert content["champion"] == "2-x"
    assert points[0]["win_rate"] == 0.7 and points[4]["win_rate"] is None


@pytest.mark.parametrize(
    "arguments", [["--grid", "seed=1,2"], ["toy.yaml"], ["--out", "x"], ["--set", "seed=1"], ["--table", "x"]]
)
def test_resume_takes_no_other_plan(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["sweep", "--resume", str(tmp_path), *arguments])
    assert isinstance(result.exception, InputError)
    assert "remove" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--set seed=S"),
        (["--wait"], "needs --host"),
        (["--name", "x"], "needs --host"),
        (["--image", "x"], "needs --katib"),
    ],
)
def test_option_without_effect_is_refused(toy: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["sweep", str(toy), "--grid", "ppo.kl_coef=1,2", *arguments])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


# --- a whole sweep ---

ENVIRONMENT = os.environ | {"RLHF_CODE_REVISION": "one"}  # also if somebody commits meanwhile


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, resident: Resident) -> tuple[Path, list[Any]]:
    """A sweep of three points that was killed while its second point ran, and resumed: its directory, and what it printed as JSON.

    Two of the points differ in PPO only, and the other one has another SFT.
    """
    folder = tmp_path_factory.mktemp("sweep")
    content = verifiable_params(tiny_model, folder, tracking={"enabled": False})
    content["ppo"] |= {"advantage": "rloo", "minibatch": 8}
    content["ppo"]["rollout"]["samples_per_prompt"] = 2
    params = write_params(folder / "params.yaml", content)
    command = [sys.executable, "-m", "pipelines", "sweep"]
    plan = [
        "--random",
        "3",
        "--grid",
        "sft.max_steps=2,3",
        "--grid",
        "ppo.kl_coef=0.05,0.1",
        "--out",
        str(folder / "out"),
    ]
    with (folder / "log").open("w") as log:
        first = resident.popen([*command, str(params), *plan], stdout=log, stderr=log, env=ENVIRONMENT)
        while not any((folder / "out").glob("2-*/finished/ppo.begun")):
            assert first.poll() is None, (folder / "log").read_text()
            time.sleep(0.02)
        first.kill()
    assert first.wait(timeout=30) == -signal.SIGKILL
    finished = {path: path.read_bytes() for path in (folder / "out").glob("1-*/**/*") if path.is_file()}
    second = resident.run([*command, "--resume", str(folder / "out"), "--json"], timeout=300, env=ENVIRONMENT)
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path: path.read_bytes() for path in (folder / "out").glob("1-*/**/*") if path.is_file()} == finished
    return folder / "out", json.loads(second.stdout)["points"]


def files_of(run: Path, stage: str) -> dict[str, Path]:
    (root,) = run.glob(f"artifacts/*/{stage}")
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


def runs_of(swept: tuple[Path, list[Any]]) -> tuple[Path, Path, Path]:
    """The runs of three points: two with the same SFT in the order of their start, and the other one."""
    folder, points = swept
    by_sft: dict[str, list[Path]] = {}
    for point in sorted(points, key=lambda point: point["name"]):
        by_sft.setdefault(point["settings"]["sft.max_steps"], []).append(folder / point["name"])
    (alone,), (one, two) = sorted(by_sft.values(), key=len)
    return one, two, alone


@pytest.mark.slow
def test_every_point_has_the_stages_of_an_ordinary_run(swept: tuple[Path, list[Any]]) -> None:
    folder, points = swept
    assert [point["state"] for point in points] == ["succeeded"] * 3
    assert all(0 <= point["win_rate_low"] <= point["win_rate"] <= point["win_rate_high"] <= 1 for point in points)
    for run in runs_of(swept):
        summary = json.loads((run / "summary.json").read_text())
        assert set(summary["stages"]) == {
            "import_model", "prepare_data", "sft", "judge", "ppo", "evaluation", "register", "notify"
        }  # fmt: skip
        for manifest in run.glob("artifacts/*/*/*/manifest.json"):
            if manifest.parent.name != "manifest":
                open_artifact(manifest.parent, *KINDS)
        for output in run.rglob("executor_output.json"):  # no path leads to another point
            text = output.read_text()
            assert str(run) in text
            assert text.count(str(folder)) == text.count(f"{run}/")


@pytest.mark.slow
def test_points_that_differ_in_ppo_share_everything_before_it(swept: tuple[Path, list[Any]]) -> None:
    one, two, alone = runs_of(swept)

    def is_shared(stage: str, other: Path) -> bool:
        mine, theirs = files_of(two, stage), files_of(other, stage)
        same = [mine[name].samefile(theirs[name]) for name in mine if name != "executor_output.json"]
        assert all(same) or not any(same)
        if all(same):
            assert {name: sha256_of(path) for name, path in mine.items() if name != "executor_output.json"} == {
                name: sha256_of(path) for name, path in theirs.items() if name != "executor_output.json"
            }
        return all(same)

    assert {stage for stage in STAGES if is_shared(stage, one)} == {"import-model", "prepare-data", "sft", "judge"}
    assert {stage for stage in STAGES if is_shared(stage, alone)} == {"import-model", "prepare-data", "judge"}
    summary = json.loads((max(one, two) / "summary.json").read_text())["stages"]
    assert {name for name, stage in summary.items() if stage["shared_with"]} >= {"sft"}
    assert all(stage["reused"] for stage in summary.values() if stage["shared_with"])


STAGES = ("import-model", "prepare-data", "sft", "judge", "ppo", "evaluation")


@pytest.mark.slow
def test_rerun_of_a_shared_stage_in_one_point_changes_no_other_point(
    swept: tuple[Path, list[Any]], resident: Resident, tmp_path: Path
) -> None:
    """The run directory was also moved, and its donors are gone."""
    one, two, _ = runs_of(swept)
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    run = tmp_path / "moved"
    shutil.copytree(two, run, symlinks=True, copy_function=lambda source, target: Path(target).hardlink_to(source))
    (manifest,) = run.glob("artifacts/*/sft/model/manifest.json")
    manifest.unlink()  # so that sft runs again
    command = [sys.executable, "-m", "pipelines", "run", "--resume", str(run)]
    result = resident.run(command, timeout=300, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    stages = json.loads((run / "summary.json").read_text())["stages"]
    assert {name for name, stage in stages.items() if not stage["reused"]} == {"sft", "notify"}
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before
    assert not files_of(run, "sft")["model/model.safetensors"].samefile(files_of(one, "sft")["model/model.safetensors"])
