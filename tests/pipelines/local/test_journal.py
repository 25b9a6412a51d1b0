"""Finished stages are reused; stages with changed inputs or modified outputs run again."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kfp.local
import pytest
from kfp import dsl
from kfp.pipeline_spec.pipeline_spec_pb2 import ExecutorOutput

from pipelines.local.journal import Journal, command_digest
from pipelines.local.run import quiet_kfp
from pipelines.local.run_dir import read_state
from pipelines.local.runner import LocalRun, StageRecord, container_processes

INPUT = dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER


@dsl.container_component
def make(script: str, said: dsl.OutputPath(str)):
    return dsl.ContainerSpec(
        image="any",
        command=["sh", "-c"],
        args=[f'mkdir -p "$(dirname "$1")"; echo ran; {script}', "make", said, "--executor-input", INPUT],
    )


@dsl.container_component
def use(word: str, said: dsl.OutputPath(str)):
    return dsl.ContainerSpec(
        image="any",
        command=["sh", "-c"],
        args=[
            'mkdir -p "$(dirname "$1")"; echo "used $2"; printf x > "$1"',
            "use",
            said,
            word,
            "--executor-input",
            INPUT,
        ],
    )


@dsl.pipeline
def two(script: str):
    first = make(script=script)
    use(word=first.outputs["said"])


def execute(folder: Path, script: str, *donors: Path) -> list[str]:
    """The log lines of the tasks of a run, or of its resumption if the folder contains one."""
    lines: list[str] = []
    local_run = LocalRun(folder / "logs", {}, lambda _stage, line: lines.append(line), Journal(folder, donors))
    with container_processes(local_run), quiet_kfp():
        kfp.local.init(
            runner=kfp.local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "out"), raise_on_error=True
        )
        two(script=script)
    return lines


def words(lines: list[str]) -> list[str]:
    return [line.partition("] ")[2] or line for line in lines]


SAY_HELLO = 'printf hello > "$1"'
REUSED = "finished earlier, verified"


def test_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    assert execute(tmp_path, SAY_HELLO) == ["ran", "used hello"]
    assert words(execute(tmp_path, SAY_HELLO)) == [REUSED, REUSED]


def test_failed_stage_runs_again_and_earlier_stages_do_not(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with pytest.raises(RuntimeError):
        execute(tmp_path, f'test -e {flag} && printf hello > "$1"')
    flag.touch()
    assert execute(tmp_path, f'test -e {flag} && printf hello > "$1"') == ["ran", "used hello"]


def test_modified_output_is_recreated_and_consumers_are_kept_if_it_is_identical(tmp_path: Path) -> None:
    execute(tmp_path, SAY_HELLO)
    said = tmp_path / "out" / "two" / "make" / "said"
    said.write_text("hellO")
    lines = words(execute(tmp_path, SAY_HELLO))
    assert lines == [f"runs again: {said} was modified", "ran", REUSED]
    assert said.read_text() == "hello"


@pytest.mark.parametrize("change", ["missing", "added"])
def test_missing_or_additional_file_counts_as_modified(tmp_path: Path, change: str) -> None:
    execute(tmp_path, SAY_HELLO)
    folder = tmp_path / "out" / "two" / "use"
    (folder / "said").unlink() if change == "missing" else (folder / "more").touch()
    lines = words(execute(tmp_path, SAY_HELLO))
    assert lines[0] == REUSED
    assert lines[1].endswith("was modified")
    assert lines[2] == "used hello"
    assert not (folder / "more").exists()


def test_changed_input_makes_the_next_stage_run_again(tmp_path: Path) -> None:
    execute(tmp_path, SAY_HELLO)
    lines = words(execute(tmp_path, 'printf goodbye > "$1"'))
    why = "runs again: its settings, its inputs or the code changed"
    assert lines == [why, "ran", why, "used goodbye"]


REPORTS = SAY_HELLO + '; printf %s "{\\"artifacts\\": {}}" > "$(dirname "$1")/executor_output.json"'


@pytest.mark.parametrize(("script", "runs_again"), [(REPORTS, False), (SAY_HELLO, True)], ids=["reported", "not"])
def test_stage_that_finished_after_its_runner_died_is_recorded_on_resume(
    tmp_path: Path, script: str, runs_again: bool
) -> None:
    execute(tmp_path, script)
    (tmp_path / "finished" / "make.json").unlink()
    assert ("ran" in execute(tmp_path, script)) is runs_again
    assert words(execute(tmp_path, script)) == [REUSED, REUSED]


@pytest.mark.parametrize("broken", ["no such artifact", "another command", "no beginning", "folder without manifest"])
def test_unrecorded_stage_with_incomplete_outputs_runs_again(tmp_path: Path, broken: str) -> None:
    execute(tmp_path, REPORTS)
    root, finished = tmp_path / "out" / "two" / "make", tmp_path / "finished"
    (finished / "make.json").unlink()
    if broken == "another command":
        (finished / "make.begun").write_text('{"command": "0123", "at": 0}')
    elif broken == "no beginning":
        (finished / "make.begun").unlink()
    else:
        (root / "executor_output.json").write_text('{"artifacts": {"model": {}}}')
        if broken == "folder without manifest":
            (root / "model").mkdir()
    assert "ran" in execute(tmp_path, REPORTS)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"record": {}, "files": {}, "command": ""}', '{"record": 1}'])
def test_unreadable_record_means_not_finished(tmp_path: Path, content: str) -> None:
    execute(tmp_path, SAY_HELLO)
    notes = sorted((tmp_path / "finished").glob("*.json"))
    assert len(notes) == 2
    notes[0].write_text(content)
    lines = words(execute(tmp_path, SAY_HELLO))
    assert lines.count(REUSED) == 1
    assert lines.count("ran") + lines.count("used hello") == 1


def executor_input(**metadata: str | float) -> str:
    artifact = {"name": "model", "uri": "/run/sft/model", "metadata": metadata}
    return json.dumps({"inputs": {"artifacts": {"sft_model": {"artifacts": [artifact]}}}, "outputs": {}})


def test_command_is_the_same_whatever_was_measured_of_its_inputs() -> None:
    """A stage that is repeated yields the same artifact with other measurements; the stages after it are not repeated."""
    first = executor_input(digest="a1", **{"memory/peak_gib": 0.471})
    again = executor_input(digest="a1", **{"memory/peak_gib": 0.473})
    other = executor_input(digest="b2", **{"memory/peak_gib": 0.471})
    unknown = [executor_input(said=word) for word in ("hello", "goodbye")]  # not from one of our stages
    one, same, two, hello, goodbye = (
        command_digest(["stage", text], Path("/run")) for text in (first, again, other, *unknown)
    )
    assert one == same
    assert len({one, two, hello, goodbye}) == 4


def command_in(run: str, **storage: str) -> list[str]:
    """A stage's command: paths as arguments, in JSON, and in JSON that is a value of JSON."""
    where = json.dumps({"checkpoint_uri": f"{run}/checkpoints", **storage})
    outputs = {"outputFile": f"{run}/artifacts/rlhf/sft/executor_output.json"}
    task = json.dumps({"inputs": {"parameterValues": {"storage": where}}, "outputs": outputs})
    tracking = json.dumps({"uri": f"sqlite:///{run}/mlflow.db"})
    return [
        "stage",
        "--model",
        f"{run}/sft/model",
        "--storage",
        where,
        "--tracking",
        tracking,
        "--executor-input",
        task,
    ]


@pytest.mark.parametrize("run", ["/elsewhere/run", "/a", '/it\'s a "run"/with spaces/ä', "/x/r.n", "/run/inner"])
def test_command_is_the_same_wherever_the_run_directory_is(run: str) -> None:
    assert command_digest(command_in(run), Path(run)) == command_digest(command_in("/x/run"), Path("/x/run"))
    assert command_digest(command_in(run), Path("/y")) != command_digest(command_in("/x/run"), Path("/y"))


@pytest.mark.parametrize("path", ["{}2/model", "/data{}/model", "see {}/model", "{}", "{}.jsonl", "{{}}/model"])
def test_path_that_only_looks_like_the_run_directory_is_no_part_of_it(path: str) -> None:
    """Other paths are inputs: two runs that read different ones have different commands."""
    digests = {
        command_digest(["stage", "--storage", json.dumps({"path": path.replace("{}", run, 1)})], Path(own))
        for run, own in (("/x/run", "/x/run"), ("/y/run", "/y/run" if path != "{}" else "/x/run"))
    }
    assert len(digests) == 2


def test_text_that_is_json_by_chance_is_compared_as_text() -> None:
    """A prompt template with another space in it is another template, although it is the same JSON."""
    texts = ['{"a": 1}', '{"a":1}']
    one, other = (command_digest(["stage", json.dumps({"inputs": {}, "template": t})], Path("/run")) for t in texts)
    assert one != other


MODEL = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1]).parent
(folder / "model").mkdir(parents=True)
(folder / "model" / "weights").write_text("hello")
Path(sys.argv[1]).write_text("hello")
uri = {"uri": str(folder / "model"), "metadata": {"model_uri": str(folder / "model")}}
(folder / "executor_output.json").write_text(json.dumps({"artifacts": {"model": {"artifacts": [uri]}}}))
"""
WRITES_PATHS = f"{sys.executable} -c '{MODEL}' \"$1\""


def outputs_of(run: Path) -> Path:
    return run / "out" / "two" / "make"


def uri_of(run: Path) -> dict[str, Any]:
    content = json.loads((outputs_of(run) / "executor_output.json").read_text())
    found: dict[str, Any] = content["artifacts"]["model"]["artifacts"][0]
    return found


@pytest.fixture
def without_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    """kfp.local refuses an artifact that the component does not declare; here only the files matter."""
    monkeypatch.setattr("kfp.local.executor_output_utils.load_executor_output", lambda **_: ExecutorOutput())


@pytest.mark.usefixtures("without_artifacts")
@pytest.mark.parametrize("move", [shutil.move, shutil.copytree], ids=["moved", "copied"])
def test_run_directory_elsewhere_keeps_its_finished_stages_with_paths_of_the_new_place(
    tmp_path: Path, move: Callable[[Path, Path], object]
) -> None:
    first, second = tmp_path / "first", tmp_path / "deep" / "second"
    execute(first, WRITES_PATHS)
    second.parent.mkdir()
    move(first, second)
    assert words(execute(second, WRITES_PATHS)) == [REUSED, REUSED]
    model = str(outputs_of(second) / "model")
    assert uri_of(second) == {"uri": model, "metadata": {"model_uri": model}}
    assert words(execute(second, WRITES_PATHS)) == [REUSED, REUSED]
    if first.exists():
        assert uri_of(first)["uri"] == str(outputs_of(first) / "model")


def shared(donor: str) -> str:
    return f"shared with {donor}, verified"


@pytest.mark.usefixtures("without_artifacts")
def test_stages_of_a_donor_are_linked_and_their_paths_are_those_of_the_new_run(tmp_path: Path) -> None:
    donor, run, third = tmp_path / "donor", tmp_path / "run", tmp_path / "third"
    execute(donor, WRITES_PATHS)
    assert words(execute(run, WRITES_PATHS, donor)) == [shared("donor"), shared("donor")]
    files = [path.relative_to(donor) for path in (donor / "out").rglob("*") if path.is_file()]
    assert len(files) == 4
    for file in files:
        is_linked = (donor / file).samefile(run / file)
        assert is_linked is (file.name != "executor_output.json")
    assert uri_of(run)["uri"] == str(outputs_of(run) / "model")
    assert uri_of(donor)["uri"] == str(outputs_of(donor) / "model")
    # It does not need the donor from now on, and is a donor itself.
    shutil.rmtree(donor)
    assert words(execute(run, WRITES_PATHS)) == [shared("donor"), shared("donor")]
    assert (run / "logs" / "make.log").read_text() == "[make] shared with donor, verified\n"
    assert read_state(run).tasks[0].line == "shared with donor, verified"
    assert words(execute(third, WRITES_PATHS, donor, run)) == [shared("donor"), shared("donor")]


def test_stage_that_differs_runs_and_so_do_those_that_read_its_output(tmp_path: Path) -> None:
    donors = [tmp_path / "one", tmp_path / "two"]
    execute(donors[0], SAY_HELLO)
    execute(donors[1], 'printf goodbye > "$1"', donors[0])
    # The same word from another script: make runs, and use shares what the first donor has made of it.
    assert words(execute(tmp_path / "three", 'printf hel > "$1"; printf lo >> "$1"', *donors)) == ["ran", shared("one")]
    assert words(execute(tmp_path / "four", SAY_HELLO, *donors)) == [shared("one"), shared("one")]


def test_stage_that_runs_again_changes_no_file_of_the_runs_that_share_it(tmp_path: Path) -> None:
    donor, run = tmp_path / "donor", tmp_path / "run"
    execute(donor, SAY_HELLO)
    execute(run, SAY_HELLO, donor)
    before = {path: path.read_bytes() for path in donor.rglob("*") if path.is_file()}
    assert execute(run, 'printf goodbye > "$1"')[1] == "ran"
    assert (run / "out" / "two" / "make" / "said").read_text() == "goodbye"
    assert {path: path.read_bytes() for path in donor.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "damage", ["modified", "missing", "unreadable record", "no record", "old record", "unfinished"]
)
def test_donor_with_damaged_outputs_is_not_used(tmp_path: Path, damage: str) -> None:
    donor, run = tmp_path / "donor", tmp_path / "run"
    execute(donor, SAY_HELLO)
    said, record = donor / "out" / "two" / "make" / "said", donor / "finished" / "make.json"
    if damage == "modified":
        said.write_text("hellO")
    elif damage == "missing":
        said.unlink()
    elif damage == "unfinished":
        shutil.rmtree(donor / "out")
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("{" if damage == "unreadable record" else '{"command": "0123"}')
    lines = words(execute(run, SAY_HELLO, donor))
    assert lines[0] == "ran"
    assert (run / "out" / "two" / "make" / "said").read_text() == "hello"
    assert words(execute(run, SAY_HELLO))[0] == REUSED


def test_files_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    execute(tmp_path / "donor", SAY_HELLO)
    assert words(execute(tmp_path / "run", SAY_HELLO, tmp_path / "donor"))[0] == shared("donor")
    said = [tmp_path / name / "out" / "two" / "make" / "said" for name in ("donor", "run")]
    assert not said[0].samefile(said[1]) and said[0].read_bytes() == said[1].read_bytes()


def test_full_disk_while_linking_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    execute(tmp_path / "donor", SAY_HELLO)
    with pytest.raises(OSError, match="No space left"):
        execute(tmp_path / "run", SAY_HELLO, tmp_path / "donor")


def test_version_in_the_registry_is_not_shared(tmp_path: Path) -> None:
    output = json.dumps({"outputs": {"outputFile": f"{tmp_path}/run/artifacts/rlhf/register/executor_output.json"}})
    donor, run = (Journal(tmp_path / "run", [tmp_path / "donor"]) for _ in range(2))
    command = ["python", "-m", "components.register", "--executor-input", output]
    donor.record_finish(StageRecord(name="register", status="succeeded"), command)
    (tmp_path / "run").rename(tmp_path / "donor")
    assert run.find_finished("register", command) == (None, "")
