"""status, logs, report, ui and compare on run directories in every state that a run can leave them in."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.commands.status import news
from pipelines.compile import compile_pipeline
from pipelines.local.run_dir import find_run, planned_tasks, read_state
from pipelines.settings import dump_yaml, load_params

ROOT = Path(__file__).resolve().parents[3]
NUMBERS = {
    "confidence": 0.95, "num_prompts": 400.0, "win_rate": 0.775, "win_rate_low": 0.733, "win_rate_high": 0.815, "kl": 3.66,
    "length_sft": 20.0, "length_ppo": 22.5, "eos_rate_sft": 0.9, "eos_rate_ppo": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    params = load_params(ROOT / "pipelines/params/tiny.yaml")
    return compile_pipeline(params, tmp_path_factory.mktemp("compiled") / "pipeline.yaml")


@pytest.fixture
def run(tmp_path: Path, compiled: Path) -> Path:
    """import_model has succeeded, prepare_data has begun."""
    folder = tmp_path / "runs" / "one"
    for name in ("finished", "logs"):
        (folder / name).mkdir(parents=True)
    (folder / "params.yaml").write_text(dump_yaml(load_params(ROOT / "pipelines/params/tiny.yaml")))
    (folder / "pipeline.yaml").write_text(compiled.read_text())
    (folder / "run.json").write_text(json.dumps({"run_id": "one-1", "tracking_uri": "sqlite:////nowhere.db"}))
    (folder / ".lock").touch()
    record = {"name": "import_model", "status": "succeeded", "seconds": 3.0}
    begin(folder, "import_model", time.time() - 60)
    (folder / "finished" / "import_model.json").write_text(json.dumps({"record": record}))
    (folder / "logs" / "import_model.log").write_text("[import_model] written\nnoise of a library\n")
    begin(folder, "prepare_data", time.time() - 30)
    (folder / "logs" / "prepare_data.log").write_text("[prepare_data] prompts: 9 train\n")
    return folder


def begin(run: Path, task: str, at: float) -> None:
    path = run / "finished" / f"{task}.begun"
    path.write_text(json.dumps({"command": "0", "at": at}))
    os.utime(path, (at, at))


def end(run: Path, status: str, reason: str, **more: object) -> None:
    (run / "summary.json").write_text(json.dumps({"status": status, "reason": reason, **more}))


@contextmanager
def locked(run: Path) -> Iterator[None]:
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


def states(run: Path) -> dict[str, str]:
    return {task.name: task.state for task in read_state(run).tasks}


def test_tasks_are_planned_in_the_order_of_their_dependencies(compiled: Path) -> None:
    names = planned_tasks(compiled)
    assert set(names) == {
        "import_model",
        "prepare_data",
        "sft",
        "reward_model",
        "judge",
        "ppo",
        "evaluation",
        "register",
        "notify",
    }
    assert [n for n in names if n != "judge"] == [
        "import_model", "prepare_data", "sft", "reward_model", "ppo", "evaluation", "register", "notify",
    ]  # fmt: skip
    assert names.index("prepare_data") < names.index("judge") < names.index("ppo")


def test_tasks_of_one_stage_have_the_names_of_their_records(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    dag = {"dag": {"tasks": {"import-sft-model": {}, "evaluation-2": {"dependentTasks": ["import-sft-model"]}}}}
    file.write_text(json.dumps({"components": {"comp-exit-handler-1": dag}}))
    assert planned_tasks(file) == ["import_sft_model", "evaluation-2", "notify"]


def test_following_without_a_terminal_says_what_changes(run: Path) -> None:
    told: dict[str, str] = {}
    with locked(run):
        assert list(news(read_state(run), told)) == [
            "[import_model] succeeded: written", "[prepare_data] running: prompts: 9 train",
        ]  # fmt: skip
        with (run / "logs" / "prepare_data.log").open("a") as log:
            log.write("[prepare_data] prompts: 3 validation\n")
        assert list(news(read_state(run), told)) == ["[prepare_data] running: prompts: 3 validation"]
        assert list(news(read_state(run), told)) == []


def test_running_run(run: Path) -> None:
    with locked(run):
        state = read_state(run)
    assert state.state == "running"
    done, current, *rest = state.tasks
    assert (done.state, done.seconds, done.line) == ("succeeded", 3.0, "written")
    assert (current.state, current.line) == ("running", "prompts: 9 train") and 29 < current.seconds < 60
    assert {task.state for task in rest} == {"waiting"} and len(rest) == 7


def write_error(run: Path) -> None:
    (run / "logs" / "prepare_data.log").write_text("[prepare_data] reading\nerror: data.prompts has no rows.\n")
    end(run, "failed", "prepare_data: data.prompts has no rows.")


@pytest.mark.parametrize(
    ("leave", "expected", "task"),
    [
        (lambda run: None, "stopped", "stopped"),  # killed
        (lambda run: end(run, "failed", "interrupted"), "stopped", "stopped"),
        (write_error, "failed", "failed"),
    ],
)
def test_run_that_has_ended_early(run: Path, leave: Callable[[Path], None], expected: str, task: str) -> None:
    leave(run)
    assert read_state(run).state == expected
    assert states(run)["prepare_data"] == task
    assert "waiting" not in states(run).values() or expected == "stopped"


def test_summary_of_an_earlier_attempt_is_not_that_of_a_killed_one(run: Path) -> None:
    end(run, "failed", "sft: nan")
    os.utime(run / "summary.json", (time.time() - 3600, time.time() - 3600))
    assert (read_state(run).state, read_state(run).reason) == ("stopped", "")


def test_branch_of_the_gate_that_was_not_taken_is_not_awaited(run: Path) -> None:
    begin(run, "register-2", time.time())
    with locked(run):
        assert [name for name in states(run) if name.startswith("register")] == ["register-2"]


def test_newest_run_is_the_default(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    other = run.parent / "two"
    other.mkdir()
    (other / "run.json").write_text("{}")
    os.utime(other / "run.json", (1, 1))
    assert find_run(None) == Path("runs/one")
    monkeypatch.chdir(run)
    with pytest.raises(InputError, match="There is no run below runs/"):
        find_run(None)


def test_status_prints_a_table_or_json(run: Path) -> None:
    shown = invoke("status", run)
    assert shown.exit_code == 0 and "prepare_data" in shown.output and "prompts: 9 train" in shown.output
    found = json.loads(invoke("status", run, "--json").output)
    assert found["state"] == "stopped" and found["tasks"][0]["name"] == "import_model"


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1)])
def test_status_follow_ends_with_the_run(run: Path, status: str, code: int) -> None:
    end(run, status, "of the gate")
    assert invoke("status", run, "--follow").exit_code == code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "[prepare_data] prompts: 9 train\n"),  # of the last task
        (["import_model"], "[import_model] written\nnoise of a library\n"),
        (["import_model", "--tail", 1], "noise of a library\n"),
        (["import_model", "--follow"], "[import_model] written\nnoise of a library\n"),
    ],
)
def test_logs(run: Path, arguments: list[object], expected: str) -> None:
    later = time.time() + 1
    os.utime(run / "logs" / "prepare_data.log", (later, later))
    assert invoke("logs", run, *arguments).output == expected


def summary(win_rate: float, *, promoted: bool) -> dict[str, object]:
    stages = {"sft": {"seconds": 61.0}, "ppo": {"seconds": 3600.0 * win_rate}}
    return {"evaluation_all": NUMBERS | {"win_rate": win_rate}, "promoted": promoted, "stages": stages}


@pytest.fixture
def two(run: Path) -> tuple[Path, Path]:
    end(run, "succeeded", "better", **summary(0.775, promoted=True))
    other = run.parent / "two|<b>"
    other.mkdir()
    (other / "run.json").write_text("{}")
    params = load_params(
        ROOT / "pipelines/params/tiny.yaml", ["ppo.kl_coef=0.5", "seed=7", "tracking.experiment=other"]
    )
    (other / "params.yaml").write_text(dump_yaml(params))
    end(other, "succeeded", "worse", **summary(0.5, promoted=False))
    return run, other


def test_compare_shows_what_differs(two: tuple[Path, Path]) -> None:
    found = json.loads(invoke("compare", *two, "--json").output)
    assert found["runs"] == ["one", "two|<b>"]
    assert sorted(row[0] for row in found["parameters"]) == ["ppo.kl_coef", "seed"]  # where results are is not compared
    assert ["seed", "0", "7"] in found["parameters"]
    assert found["results"][0] == ["decision", "promoted", "rejected"]
    assert ["win rate (judge), [95% interval]", "0.775 [0.733, 0.815]", "0.500 [0.733, 0.815]"] in found["results"]
    assert found["stages"] == [["sft", "1:01", "1:01"], ["ppo", "46:30", "30:00"], ["sum", "47:31", "31:01"]]


def test_compare_as_text_markdown_and_html(two: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    assert "Parameters that differ" in invoke("compare", *two, "--html", page).output
    markdown = invoke("compare", *two, "--markdown").output
    assert "| seed | 0 | 7 |" in markdown and "| two\\|<b> |" in markdown
    html = page.read_text()
    assert "<td>30:00</td>" in html and "two|&lt;b&gt;" in html and "<b>" not in html and "http" not in html


def test_report_prints_its_path(run: Path) -> None:
    (run / "report.html").write_text("")
    assert invoke("report", run, "--no-open").output.strip() == str(run / "report.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "{run}/logs"], "contains no run"),
        (["logs", "{run}", "ppo"], "has no log of the task ppo; its tasks with logs: "),
        (["report", "{run}"], "has no report yet"),
        (["compare", "{run}", "{run}"], "has no evaluation to compare"),
        (["compare", "{run}"], "at least two"),
        (["status", "5f0c6f0e"], "Pass the address of Kubeflow Pipelines with --host"),
        (["logs", "5f0c6f0e"], "Name the task of run 5f0c6f0e"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(run: Path, arguments: list[str], message: str) -> None:
    result = invoke(*[argument.format(run=run) for argument in arguments])
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_ui_refuses_a_port_in_use_and_a_run_without_mlflow(run: Path) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        result = invoke("ui", run, "--port", server.getsockname()[1], "--no-open")
    assert isinstance(result.exception, InputError) and "choose another one with --port" in str(result.exception)
    (run / "run.json").write_text(json.dumps({"run_id": "one-1", "tracking_uri": ""}))
    assert "without MLflow" in str(invoke("ui", run).exception)


def test_damaged_files_are_named(run: Path) -> None:
    (run / "summary.json").write_text("{")
    assert f"{run}/summary.json cannot be read" in str(invoke("status", run).exception)
