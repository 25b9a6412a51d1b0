"""Finished stages are reused; stages with changed inputs or modified outputs run again."""

import json
from pathlib import Path

import kfp.local
import pytest
from kfp import dsl

from pipelines.local.journal import Journal, command_digest
from pipelines.local.run import quiet_kfp
from pipelines.local.runner import LocalRun, container_processes

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


def execute(folder: Path, script: str) -> list[str]:
    """The log lines of the tasks of a run, or of its resumption if the folder contains one."""
    lines: list[str] = []
    local_run = LocalRun(folder / "logs", {}, lambda _stage, line: lines.append(line), Journal(folder / "finished"))
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
    assert command_digest(["stage", first]) == command_digest(["stage", again])
    assert command_digest(["stage", first]) != command_digest(["stage", other])
    unknown = [executor_input(said=word) for word in ("hello", "goodbye")]  # not from one of our stages
    assert command_digest(["stage", unknown[0]]) != command_digest(["stage", unknown[1]])
