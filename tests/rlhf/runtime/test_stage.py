import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import Manifest, write_manifest
from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.config.storage import CheckpointConfig, TrackingConfig
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.runtime import stage as stage_module
from components.rlhf.runtime import termination
from components.rlhf.runtime.stage import StageRun, stage_program, stage_run
from components.rlhf.text.errors import InputError, RetryableError

SETTINGS = '{"decision":"promote"}'
ROOT = Path(__file__).resolve().parents[3]


class Recorder:
    """A tracker that records its calls."""

    def __init__(self) -> None:
        self.start_arguments: dict[str, Any] = {}
        self.calls: list[Any] = []
        self.tuned: list[str] = []  # functions that tune the process

    def start(self, config: TrackingConfig, **arguments: Any) -> "Recorder":
        self.start_arguments = {"config": config, **arguments}
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls.append((dict(metrics), step))

    def log_file(self, path: Path, name: str = "") -> None:
        self.calls.append(path.name)

    def log_text(self, name: str, text: str) -> None:
        self.calls.append((name, text))

    def flush(self) -> None:
        return

    def finish(self, status: str, error: str = "") -> None:
        self.calls.append(status)
        self.error = error


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(stage_module, "start_tracking_process", recorder.start)
    # Their effect on this process could not be undone.
    for name in ("keep_freed_memory", "keep_few_kernels", "collect_old_objects_rarely", "die_with_parent"):
        monkeypatch.setattr(stage_module, name, partial(recorder.tuned.append, name))
    return recorder


def run(**options: Any) -> Any:
    return stage_run(
        "demo", RegisterStageConfig, **({"settings": SETTINGS, "tracking": "{}", "executor_input": ""} | options)
    )


def refusal(capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """The error message of a stage that fails before its body runs."""
    with pytest.raises(SystemExit) as end, run(**options):
        pytest.fail("the body must not run")
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def executor_input(folder: Path, *names: str) -> str:
    artifacts = {name: {"artifacts": [{"name": name, "uri": f"file:///{name}"}]} for name in names}
    return json.dumps({"outputs": {"artifacts": artifacts, "outputFile": str(folder / "executor_output.json")}})


def test_stage_tunes_its_process_before_its_body(tracker: Recorder) -> None:
    with run():
        assert tracker.tuned == [
            "keep_freed_memory", "keep_few_kernels", "collect_old_objects_rarely", "die_with_parent"
        ]  # fmt: skip


def test_stage_that_has_no_plan_does_not_speak_of_one(tracker: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    with run() as stage:
        stage.plan_memory()
        assert stage.memory.plan is None
    assert "planned" not in capsys.readouterr().out


# --- success and failure ---


def test_successful_stage_reports_all_outputs(tracker: Recorder, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    manifest = write_manifest(tmp_path / "model", kind="policy_model", facts={"num_layers": 3})
    with run(executor_input=executor_input(tmp_path, "model", "metrics", "summary")) as stage:
        assert isinstance(stage, StageRun)
        assert stage.config.decision == "promote"
        assert stage.settings_text == SETTINGS  # the original text, of which digests are computed
        stage.report_output("model", manifest)
        stage.write_report("summary", tmp_path / "new/summary.md", "# Done\n")
        stage.write_metrics(tmp_path / "new/metrics", {"loss": 0.5, "steps": 3.0})
        assert not (tmp_path / "executor_output.json").exists()

    reported = json.loads((tmp_path / "executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    metadata = {name: entry["artifacts"][0]["metadata"] for name, entry in reported.items()}
    assert metadata == {"model": manifest.metadata(), "metrics": {"loss": 0.5, "steps": 3.0}, "summary": {}}
    assert json.loads((tmp_path / "new/metrics").read_text(encoding="utf-8")) == {"loss": 0.5, "steps": 3.0}
    assert (tmp_path / "new/summary.md").read_text(encoding="utf-8") == "# Done\n"
    assert tracker.calls == ["summary.md", ({"final/loss": 0.5, "final/steps": 3.0}, 0), "FINISHED"]


def test_plots_of_a_page_are_pictures_in_mlflow(tracker: Recorder, tmp_path: Path) -> None:
    first, second = (f'<svg width="9" xmlns="http://www.w3.org/2000/svg">\n<g>{n}</g></svg>' for n in "12")
    page = f"<!doctype html><p>{first}<p>{second}<svg class=styled-by-the-page></svg>"
    with run() as stage:
        stage.write_report("curves", tmp_path / "curves", page)
    assert tracker.calls == ["curves", ("curves.svg", first), ("curves_2.svg", second), "FINISHED"]


@pytest.mark.parametrize("fails", [False, True])
def test_on_success_runs_after_outputs_are_reported(tracker: Recorder, tmp_path: Path, fails: bool) -> None:
    """Otherwise a crash in between would lose both the checkpoints and the outputs."""
    output_existed: list[bool] = []
    output = tmp_path / "executor_output.json"
    with contextlib.suppress(ZeroDivisionError), run(executor_input=executor_input(tmp_path)) as stage:
        stage.on_success.append(lambda: output_existed.append(output.exists()))
        assert 1 // (not fails)
    assert output_existed == ([] if fails else [True])


@pytest.mark.parametrize("error", [InputError("s3://b could not be reached."), OSError("the disk is gone")])
def test_stage_that_cannot_clean_up_succeeds(
    tracker: Recorder, tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with run(executor_input=executor_input(tmp_path)) as stage:
        stage.on_success.append(fail)
    assert tracker.calls == ["FINISHED"] and capsys.readouterr().err == f"warning: {error}\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("data.jsonl:3 is\nnot JSON."), "error: data.jsonl:3 is\\nnot JSON."),
        (RetryableError("s3://b is away."), "s3://b is away."),
        (ValueError("two\nlines"), "ValueError: two lines"),
        (InputError("x" * 9000), f"error: {'x' * 4089}"),
        (InputError("the token is hunter2hunter2"), "error: the token is ***"),
        (KeyboardInterrupt(), ""),
        (SystemExit(143), ""),
    ],
)
def test_reason_of_a_failure_is_the_termination_message(
    tracker: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    """Kubernetes shows it; "error: " in front means that another attempt would fail as well."""
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(termination, "TERMINATION_LOG", log)
    monkeypatch.setenv("API_TOKEN", "hunter2hunter2")
    for expected in (message, message):  # the first process of a container that fails has the reason
        with pytest.raises((Exception, SystemExit, KeyboardInterrupt)), run():
            raise error
        assert log.read_text() == expected


def test_nothing_is_written_outside_of_kubernetes(
    tracker: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(termination, "TERMINATION_LOG", tmp_path / "none")
    with pytest.raises(SystemExit), run():
        raise InputError("x")
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_cannot_be_written_is_refused(
    tracker: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(SystemExit), run():
        pytest.fail("the stage must not start")
    assert f"TMPDIR is {tmp_path / 'missing'}, which user" in capsys.readouterr().err
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with run():
        pass


def test_error_of_a_stage_is_logged_to_its_mlflow_run(tracker: Recorder) -> None:
    for error, expected in ((InputError("x."), "x."), (ValueError("y"), "ValueError: y"), (SystemExit(1), "")):
        with pytest.raises((Exception, SystemExit, KeyboardInterrupt)), run():
            raise error
        assert tracker.error == expected


def test_input_error_is_printed_as_one_line(
    tracker: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, run(executor_input=executor_input(tmp_path, "model")):
        raise InputError("data.jsonl:3 is not JSON.")
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "error: data.jsonl:3 is not JSON.\n")
    assert tracker.calls == ["FAILED"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_other_errors_keep_their_traceback(tracker: Recorder, tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), run(executor_input=executor_input(tmp_path, "model")):
        raise error
    assert tracker.calls == ["FAILED"]
    assert list(tmp_path.iterdir()) == []


def test_run_id_comes_from_environment(tracker: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_RUN_ID", raising=False)
    tracking = TrackingConfig(uri="http://x").canonical_json()
    with run(tracking=tracking):
        pass
    assert tracker.start_arguments == {
        "config": TrackingConfig(uri="http://x"),
        "run_id": "manual",
        "stage": "demo",
        "params": {"decision": "promote"},
    }
    monkeypatch.setenv("RLHF_RUN_ID", "run-7")
    with run():
        pass
    assert tracker.start_arguments["run_id"] == "run-7"


def fill(folder: Path) -> None:
    (folder / "x").write_bytes(b"abc")


def test_artifact_is_written_with_lineage(tracker: Recorder, tmp_path: Path) -> None:
    base = Manifest(kind="base_model", files={}, tokenizer_digest="t", chat_template_digest="c")
    with run(executor_input=executor_input(tmp_path, "model")) as stage:
        stage.write_artifact(
            "model",
            tmp_path / "model",
            fill,
            kind="sft_model",
            parents={"base": base},
            facts={"n": 1},
            tokenizer_of=base,
        )
    manifest = open_artifact(tmp_path / "model", "sft_model")
    assert manifest.parents == {"base": base.digest}
    assert (manifest.tokenizer_digest, manifest.chat_template_digest) == ("t", "c")
    assert manifest.config_digest == hashlib.sha256(SETTINGS.encode()).hexdigest()
    reported = json.loads((tmp_path / "executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    assert reported["model"]["artifacts"][0]["metadata"] == manifest.metadata()


def test_other_ranks_read_what_is_streamed_and_write_nothing(
    tracker: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "1"):
        read: list[int] = []
        weights = (read.append(number) or number for number in range(3))  # type: ignore[func-returns-value]

        def write(folder: Path, weights: Iterator[int] = weights) -> None:
            (folder / "x").write_text(str(list(weights)))

        monkeypatch.setenv("RANK", rank)
        with run() as stage:
            stage.write_artifact(
                "model", tmp_path / rank, write, kind="sft_model", parents={}, facts={}, streamed=weights
            )
        assert read == [0, 1, 2]
    assert (tmp_path / "0" / "x").read_text() == "[0, 1, 2]"
    assert not (tmp_path / "1").exists()


def test_failed_artifact_leaves_nothing(tracker: Recorder, tmp_path: Path) -> None:
    def fill_half(folder: Path) -> None:
        fill(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), run() as stage:
        stage.write_artifact("judge", tmp_path / "judge", fill_half, kind="judge", parents={}, facts={})
    assert list(tmp_path.iterdir()) == []


# --- end of a process ---

PROGRAM = """
import atexit, ctypes, sys
from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.runtime.stage import stage_program
from components.rlhf.text.errors import InputError, RetryableError

@stage_program("demo", RegisterStageConfig, reads={}, writes={"metrics": "Numbers."})
def main(run, metrics):
    atexit.register(print, "tidied", end="")
    run.write_metrics(metrics, {"loss": 0.5})
    EXEC

main()
"""
ABORT_AFTER_FINALIZATION = "libc = ctypes.CDLL(None); getattr(libc, '__cxa_atexit')(libc.abort, None, None)"


def run_program(folder: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ["--settings", SETTINGS, "--metrics", str(folder / "metrics")]
    options += ["--executor-input", executor_input(folder, "metrics")]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("EXEC", body), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_successful_stage_is_not_finalized(tmp_path: Path, rank: int, world_size: int) -> None:
    """It takes time, and a thread of a collective may abort the process then. atexit handlers and flushing are done."""
    done = run_program(tmp_path, ABORT_AFTER_FINALIZATION, RANK=str(rank), WORLD_SIZE=str(world_size))
    assert (done.returncode, done.stdout, done.stderr) == (0, "tidied", "")
    assert {path.name for path in tmp_path.iterdir()} == ({"metrics", "executor_output.json"} if rank == 0 else set())


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("raise InputError('no data.')", 1, "error: no data."),
        ("sys.exit(143)", 143, ""),
    ],
)
def test_failed_rank_keeps_its_exit_code_and_error(tmp_path: Path, body: str, code: int, error: str) -> None:
    done = run_program(tmp_path, body, RANK="0", WORLD_SIZE="2")
    assert (done.returncode, done.stdout) == (code, "tidied")
    assert done.stderr.rstrip().endswith(error)
    assert not (tmp_path / "executor_output.json").exists()


# --- settings ---


def test_settings_from_a_file(tracker: Recorder, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(f"\n{SETTINGS}\n", encoding="utf-8")
    with run(settings=str(tmp_path / "s.json")) as stage:
        assert stage.config == RegisterStageConfig(decision="promote")


def test_settings_with_surrounding_whitespace(tracker: Recorder) -> None:
    with run(settings=f" {SETTINGS} ") as stage:
        assert stage.config == RegisterStageConfig(decision="promote")


def test_settings_that_are_neither_json_nor_file_are_refused(
    tracker: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.json"
    assert refusal(capsys, settings=str(path)) == (
        f"--settings {path} is neither JSON nor a readable file (No such file or directory)."
    )
    assert "(Is a directory)" in refusal(capsys, settings=str(tmp_path))
    path.write_bytes(b"\xff")
    assert refusal(capsys, settings=str(path)) == f"--settings {path} is not UTF-8; save it as UTF-8."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "Settings: the parameters is '{': invalid JSON: EOF while parsing an object at line 1 column 1."),
        ('{"decision":"maybe"}', "Settings: decision is 'maybe': input should be 'promote' or 'reject'."),
        ('{"decison":"reject"}', "Settings: decision is missing; decison is not a parameter; did you mean decision?"),
    ],
)
def test_invalid_settings_are_refused(
    tracker: Recorder, settings: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, settings=settings) == message
    assert tracker.calls == []


def test_invalid_tracking_settings_are_refused(tracker: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, tracking='{"url": "http://x"}')
    assert message == "Settings: url is not a parameter; did you mean uri?"


def test_invalid_executor_input_fails_the_stage(tracker: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), run(executor_input="{}"):
        pass
    assert capsys.readouterr().err.startswith("error: --executor-input is not KFP's executor input")
    assert tracker.calls == ["FAILED"]


# --- options ---


def test_checkpoints_use_storage_settings(tmp_path: Path, tracker: Recorder) -> None:
    @stage_program("demo", RegisterStageConfig, reads={}, writes={})
    def program(stage: StageRun[RegisterStageConfig]) -> None:
        store = stage.training_context(CheckpointConfig(), SINGLE_PROCESS).checkpoints.store
        click.echo(repr(store and store.uri))

    storage = json.dumps({"checkpoint_uri": str(tmp_path)})
    arguments = ["--settings", SETTINGS, "--storage", storage]
    assert CliRunner().invoke(program, arguments).output == f"{str(tmp_path)!r}\n"
    assert CliRunner().invoke(program, ["--settings", SETTINGS]).output == "None\n"


def test_program_has_one_required_option_per_path(tmp_path: Path, tracker: Recorder) -> None:
    @stage_program("demo", RegisterStageConfig, reads={"base_model": "Model to read."}, writes={"report": "A report."})
    def program(stage: StageRun[RegisterStageConfig], base_model: Path, report: Path) -> None:
        click.echo(f"{base_model} {report} {stage.config.decision} {stage.executor_input!r}")

    arguments = ["--settings", SETTINGS, "--base-model", "a", "--report", "b"]
    assert CliRunner().invoke(program, arguments).output == "a b promote ''\n"
    assert "Missing option '--report'" in CliRunner().invoke(program, arguments[:-2]).output
    text = CliRunner().invoke(program, ["--help"]).output
    options = ("--base-model", "--report", "--settings", "--tracking", "--storage", "--executor-input")
    assert [text.index(option) for option in options] == sorted(text.index(option) for option in options)
    assert "Model to read.  [required]" in text


@pytest.mark.parametrize("kfp_uri", ["s3://pipelines/run/model", "{folder}/model"])
def test_published_model_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kfp_uri: str) -> None:
    """A model that is published to a folder keeps KFP's URI."""
    monkeypatch.setenv("RLHF_RUN_ID", "run-1")
    kfp_uri = kfp_uri.format(folder=tmp_path)
    model = {"artifacts": [{"name": "model", "uri": kfp_uri}]}
    text = json.dumps({"outputs": {"artifacts": {"model": model}, "outputFile": str(tmp_path / "output.json")}})
    storage = json.dumps({"publish_uri": str(tmp_path / "published")})
    with run(executor_input=text, storage=storage) as stage:
        stage.write_artifact("model", tmp_path / "model", fill, kind="sft_model", parents={}, facts={})
    published = tmp_path / "published" / "run-1" / "demo" / "model"
    assert sorted(path.name for path in published.iterdir()) == ["manifest.json", "x"]
    (reported,) = json.loads((tmp_path / "output.json").read_text())["artifacts"]["model"]["artifacts"]
    assert reported["uri"] == kfp_uri
    assert reported["metadata"]["published_uri"] == str(published)
