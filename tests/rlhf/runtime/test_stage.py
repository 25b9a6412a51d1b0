import contextlib
import hashlib
import json
from collections.abc import Mapping
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
from components.rlhf.runtime.stage import StageRun, stage_options, stage_run, storage_option
from components.rlhf.text.errors import InputError

SETTINGS = '{"decision":"promote"}'


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.told: list[Any] = []

    def start(self, settings: TrackingConfig, **started: Any) -> "Recorder":
        self.started = {"settings": settings, **started}
        return self

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.told.append((dict(metrics), step))

    def log_file(self, path: Path) -> None:
        self.told.append(path.name)

    def flush(self) -> None:
        return

    def finish(self, status: str) -> None:
        self.told.append(status)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(stage_module, "start_tracking", recorder.start)
    for lasting in ("keep_freed_memory", "die_with_parent"):  # would stay with this process for good
        monkeypatch.setattr(stage_module, lasting, lambda: None)
    return recorder


def run(**options: Any) -> Any:
    return stage_run(
        "demo", RegisterStageConfig, **({"settings": SETTINGS, "tracking": "{}", "executor_input": ""} | options)
    )


def refusal(capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """The one line of a stage whose start fails."""
    with pytest.raises(SystemExit) as end, run(**options):
        pytest.fail("the body must not run")
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def executor_input(folder: Path, *names: str) -> str:
    artifacts = {name: {"artifacts": [{"name": name, "uri": f"file:///{name}"}]} for name in names}
    return json.dumps({"outputs": {"artifacts": artifacts, "outputFile": str(folder / "executor_output.json")}})


# --- ends ---


def test_a_good_end_reports_every_output(tracker: Recorder, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    manifest = write_manifest(tmp_path / "model", kind="policy_model", facts={"num_layers": 3})
    given = executor_input(tmp_path, "model", "metrics", "summary")
    with run(executor_input=given) as stage:
        assert isinstance(stage, StageRun)
        assert stage.config.decision == "promote"
        assert stage.settings_text == SETTINGS  # digests are of the text that came, not of one made anew
        stage.report_output("model", manifest)
        stage.write_report("summary", tmp_path / "new/summary.md", "# Done\n")
        stage.write_metrics(tmp_path / "new/metrics", {"loss": 0.5, "steps": 3.0})
        assert not (tmp_path / "executor_output.json").exists()

    reported = json.loads((tmp_path / "executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    metadata = {name: entry["artifacts"][0]["metadata"] for name, entry in reported.items()}
    assert metadata == {"model": manifest.metadata(), "metrics": {"loss": 0.5, "steps": 3.0}, "summary": {}}
    assert json.loads((tmp_path / "new/metrics").read_text(encoding="utf-8")) == {"loss": 0.5, "steps": 3.0}
    assert (tmp_path / "new/summary.md").read_text(encoding="utf-8") == "# Done\n"
    assert tracker.told == ["summary.md", ({"final/loss": 0.5, "final/steps": 3.0}, 0), "FINISHED"]


@pytest.mark.parametrize("fails", [False, True])
def test_checkpoints_go_when_the_outputs_have_been_reported(tracker: Recorder, tmp_path: Path, fails: bool) -> None:
    """Who dies between the two would have nothing to go on with, and nothing to show."""
    seen: list[bool] = []
    output = tmp_path / "executor_output.json"
    with contextlib.suppress(ZeroDivisionError), run(executor_input=executor_input(tmp_path)) as stage:
        stage.on_success.append(lambda: seen.append(output.exists()))
        assert 1 // (not fails)
    assert seen == ([] if fails else [True])


def test_a_mistake_of_the_user_is_one_line(
    tracker: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, run(executor_input=executor_input(tmp_path, "model")):
        raise InputError("data.jsonl:3 is not JSON.")
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "error: data.jsonl:3 is not JSON.\n")
    assert tracker.told == ["FAILED"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_mistake_of_ours_keeps_its_traceback(tracker: Recorder, tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), run(executor_input=executor_input(tmp_path, "model")):
        raise error
    assert tracker.told == ["FAILED"]
    assert list(tmp_path.iterdir()) == []


def test_the_run_id_comes_from_the_platform(tracker: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_RUN_ID", raising=False)
    tracking = TrackingConfig(uri="http://x").canonical_json()
    with run(tracking=tracking):
        pass
    assert tracker.started == {
        "settings": TrackingConfig(uri="http://x"),
        "run_id": "by-hand",
        "stage": "demo",
        "params": {"decision": "promote"},
    }
    monkeypatch.setenv("RLHF_RUN_ID", "run-7")
    with run():
        pass
    assert tracker.started["run_id"] == "run-7"


def fill(folder: Path) -> None:
    (folder / "x").write_bytes(b"abc")


def test_an_artifact_is_written_with_its_lineage(tracker: Recorder, tmp_path: Path) -> None:
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
    made = open_artifact(tmp_path / "model", "sft_model")
    assert made.parents == {"base": base.digest}
    assert (made.tokenizer_digest, made.chat_template_digest) == ("t", "c")
    assert made.config_digest == hashlib.sha256(SETTINGS.encode()).hexdigest()
    reported = json.loads((tmp_path / "executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    assert reported["model"]["artifacts"][0]["metadata"] == made.metadata()


def test_an_artifact_that_fails_halfway_is_not_there(tracker: Recorder, tmp_path: Path) -> None:
    def fill_half(folder: Path) -> None:
        fill(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), run() as stage:
        stage.write_artifact("judge", tmp_path / "judge", fill_half, kind="judge", parents={}, facts={})
    assert list(tmp_path.iterdir()) == []


# --- settings ---


def test_settings_from_a_file(tracker: Recorder, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(f"\n{SETTINGS}\n", encoding="utf-8")
    with run(settings=str(tmp_path / "s.json")) as stage:
        assert stage.config == RegisterStageConfig(decision="promote")


def test_settings_as_text_with_space_around(tracker: Recorder) -> None:
    with run(settings=f" {SETTINGS} ") as stage:
        assert stage.config == RegisterStageConfig(decision="promote")


def test_settings_that_are_neither(tracker: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.json"
    assert refusal(capsys, settings=str(path)) == (
        f"--settings {path} is neither JSON text nor a readable file (No such file or directory)."
    )
    assert "(Is a directory)" in refusal(capsys, settings=str(tmp_path))
    path.write_bytes(b"\xff")
    assert refusal(capsys, settings=str(path)) == f"--settings {path} is not UTF-8; save it as UTF-8."


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{", "Settings: the parameters is '{': invalid JSON: EOF while parsing an object at line 1 column 1."),
        ('{"decision":"maybe"}', "Settings: decision is 'maybe': input should be 'promote' or 'reject'."),
        ('{"decison":"reject"}', "Settings: decision is missing; decison is not a parameter; did you mean decision?"),
    ],
)
def test_bad_settings(tracker: Recorder, settings: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, settings=settings) == said
    assert tracker.told == []


def test_bad_tracking_settings(tracker: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, tracking='{"url": "http://x"}')
    assert said == "Settings: url is not a parameter; did you mean uri?"


def test_bad_executor_input(tracker: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), run(executor_input="{}"):
        pass
    assert capsys.readouterr().err.startswith("error: --executor-input is not KFP's executor input")
    assert tracker.told == ["FAILED"]


# --- options ---


def test_checkpoints_go_where_the_storage_settings_say(tmp_path: Path) -> None:
    @click.command()
    @storage_option
    @stage_options
    def command(storage: str, settings: str, tracking: str, executor_input: str) -> None:
        assert (tracking, executor_input) == ("{}", "")
        with run(storage=storage) as stage:
            store = stage.training_context(CheckpointConfig(), SINGLE_PROCESS).checkpoints.store
            click.echo(repr(store and store.uri))

    uri = json.dumps({"checkpoint_uri": str(tmp_path)})
    assert CliRunner().invoke(command, ["--settings", "{}", "--storage", uri]).output == f"{str(tmp_path)!r}\n"
    assert CliRunner().invoke(command, ["--settings", "{}"]).output == "None\n"


@pytest.mark.parametrize("kept", ["s3://pipelines/run/model", "{folder}/model"])
def test_a_model_is_published_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    """Into a folder, of which KFP is told nothing: it keeps its own copy."""
    monkeypatch.setenv("RLHF_RUN_ID", "run-1")
    kept = kept.format(folder=tmp_path)
    model = {"artifacts": [{"name": "model", "uri": kept}]}
    given = json.dumps({"outputs": {"artifacts": {"model": model}, "outputFile": str(tmp_path / "output.json")}})
    storage = json.dumps({"publish_uri": str(tmp_path / "published")})
    with run(executor_input=given, storage=storage) as stage:
        fill = lambda draft: (draft / "config.json").write_text("{}")  # noqa: E731
        stage.write_artifact("model", tmp_path / "model", fill, kind="sft_model", parents={}, facts={})
    place = tmp_path / "published" / "run-1" / "demo" / "model"
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "manifest.json"]
    (written,) = json.loads((tmp_path / "output.json").read_text())["artifacts"]["model"]["artifacts"]
    assert written["uri"] == kept
    assert written["metadata"]["published_uri"] == str(place)
