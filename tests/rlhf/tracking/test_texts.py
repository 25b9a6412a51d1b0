"""Awkward texts in every place of MLflow that takes one, on a real SQLite store."""

import json
import re
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking.mlflow import start_tracking
from components.rlhf.tracking.parent import open_parent
from components.rlhf.tracking.registry import register_version
from components.rlhf.tracking.runs import find_runs
from components.rlhf.tracking.texts import database_file, database_uri, equals, key_of
from tests.support.mlflow_database import new_database

AWKWARD = [
    "it's a run", 'say "hello"', """both ' and " quotes""", "a;b", "50% off", "100%25", "a_b", "back\\slash", "end\\", "tick`tick", "-- x",
    "x' OR '1'='1", "è 你好", "a?b", "a#b", "a&b=c", "$HOME", "{{name}}", "<b>", "a+b", " padded ",
]  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_database(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def tracking(template: Path) -> TrackingConfig:
    return TrackingConfig(uri=database_uri(template), experiment="tests")


@pytest.fixture(scope="module")
def client(tracking: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking.uri)


@pytest.mark.parametrize("text", AWKWARD)
def test_run_of_any_name_is_tracked(
    tracking: TrackingConfig, client: MlflowClient, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run id, stage, error, and keys and values of settings and metrics are the text."""
    for stage in (text, "evaluation"):
        tracker = start_tracking(tracking, run_id=text, stage=stage, params={text: {"key": text}})
        tracker.log({f"reward/{text}": 1.5}, 1)
        tracker.finish("FAILED", text)
    start_tracking(tracking, run_id=text, stage="evaluation", params={}).finish("FINISHED")  # resumes its run
    parent = open_parent(tracking, text)
    assert parent
    first, second = parent.stages()
    assert (first.name, first.error, first.status, second.status) == (text, text, "FAILED", "FINISHED")
    run = client.get_run(first.mlflow_run_id)
    assert list(run.data.params.values()) == [text] and list(run.data.metrics.values()) == [1.5]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", AWKWARD)
def test_model_and_experiment_of_any_name_are_registered_or_refused(
    tracking: TrackingConfig, client: MlflowClient, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrackingConfig.model_validate({**tracking.model_dump(), "experiment": text, "uri": tracking.uri})
    start_tracking(config, run_id="run", stage="sft", params={}).finish("FINISHED")
    assert client.get_experiment_by_name(text)
    model = {**tracking.model_dump(), "registered_model": text}
    if "?" in text:
        with pytest.raises(ValueError, match="choose another name"):
            TrackingConfig.model_validate(model)
        return
    config = TrackingConfig.model_validate(model)
    for attempt in range(2):
        found = register(config, text, tmp_path)
        assert found == "1", attempt
    assert client.get_model_version_by_alias(text, "champion").tags["reason"] == text
    assert capsys.readouterr().err == ""


def register(config: TrackingConfig, text: str, folder: Path) -> str:
    return register_version(
        config, folder=folder, run_id=text, decision="promote", reason=text, lineage={"parent": text}
    )


@pytest.mark.parametrize("text", [text for text in AWKWARD if "/" not in text])
def test_run_directory_of_any_name_has_a_database(template: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / text / "mlflow.db"
    file.parent.mkdir()
    shutil.copy(template, file)
    uri = database_uri(file)
    assert database_file(uri) == file
    config = TrackingConfig(uri=uri, experiment="here")
    tracker = start_tracking(config, run_id="x", stage="sft", params={})
    report = tmp_path / "report.md"
    report.write_text("# x\n", encoding="utf-8")
    tracker.log_file(report)
    tracker.finish("FINISHED")
    assert b"here" in file.read_bytes()
    elsewhere = [path for path in tmp_path.rglob("*") if path.is_file() and file.parent not in path.parents]
    assert elsewhere == [report]
    assert len(list(file.parent.rglob("report.md"))) == 1


@given(st.text(alphabet=string.printable + "äß你", min_size=1, max_size=300))
def test_any_name_becomes_a_key_that_mlflow_accepts(name: str) -> None:
    key = key_of(name)
    _validate_metric_name(key)
    _validate_param_name(key)
    assert len(key) <= 250
    if re.fullmatch(r"[a-z_]+(/[a-z_]+)*", name) and len(name) <= 250:
        assert key == name


@pytest.mark.parametrize(
    ("one", "other"), [("a!", "a?"), ("a//b", "a/b"), ("a/", "a"), ("../a", "a"), ("x" * 260, "x" * 261), ("a\n", "a")]
)
def test_different_names_have_different_keys(one: str, other: str) -> None:
    assert key_of(one) != key_of(other)


def test_quotes_of_a_filter_are_those_that_the_text_lacks() -> None:
    assert equals("name", "x") == "name = 'x'"
    assert equals("name", "it's") == 'name = "it\'s"'
    assert equals("name", """a'b"c""") == """name LIKE 'a%b"c'"""


def test_run_found_only_by_its_pattern_is_not_taken(tracking: TrackingConfig, client: MlflowClient) -> None:
    start_tracking(tracking, run_id="""a'b"c""", stage="sft", params={}).finish("FINISHED")
    start_tracking(tracking, run_id="""aXb"c""", stage="sft", params={}).finish("FINISHED")
    experiment = client.get_experiment_by_name("tests")
    assert experiment
    found: list[Any] = list(find_runs(client, experiment.experiment_id, """a'b"c"""))
    assert [run.data.tags["rlhf.run_id"] for run in found] == ["""a'b"c"""]
    assert json.loads(json.dumps(found[0].data.tags))["rlhf.run_id"] == """a'b"c"""


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a?b", "..", "x" * 257])
def test_name_that_no_model_can_have_is_refused_at_parse_time(name: str) -> None:
    with pytest.raises(ValueError, match="choose another name"):
        TrackingConfig(registered_model=name)


@pytest.mark.parametrize("name", ["", "  ", "x" * 501])
def test_name_that_no_experiment_can_have_is_refused_at_parse_time(name: str) -> None:
    with pytest.raises(ValueError, match="choose another name"):
        TrackingConfig(experiment=name)
