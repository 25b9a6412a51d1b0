import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components.rlhf.runtime.executor import write_executor_output, write_parameter
from components.rlhf.text.errors import InputError


def executor_input(output_file: Path, *names: str) -> str:
    """As KFP fills in `{{$}}`."""
    artifacts = {
        name: {
            "artifacts": [
                {
                    "name": f"run/task/{name}",
                    "type": {"schemaTitle": "system.Model", "schemaVersion": "0.0.1"},
                    "uri": f"minio://bucket/{name}",
                    "metadata": {"display_name": name},
                }
            ]
        }
        for name in names
    }
    outputs = {"artifacts": artifacts, "outputFile": str(output_file), "parameters": {"decision": {"outputFile": "/d"}}}
    return json.dumps({"inputs": {"parameterValues": {"settings": "{}"}}, "outputs": outputs})


@pytest.fixture
def output_file(tmp_path: Path) -> Path:
    return tmp_path / "deep/executor_output.json"


def test_what_is_written_passes_the_clusters_strict_parser(output_file: Path) -> None:
    metadata: dict[str, Any] = {"kind": "policy_model", "num_parameters": 134_515_008, "score": 0.25, "empty": ""}
    write_executor_output(executor_input(output_file, "model", "curves"), {"model": metadata})

    text = output_file.read_text(encoding="utf-8")
    parsed = pipeline_spec_pb2.ExecutorOutput()
    json_format.Parse(text, parsed, ignore_unknown_fields=False)  # raises on a field that KFP does not know
    assert set(parsed.artifacts) == {"model", "curves"}
    model = parsed.artifacts["model"].artifacts[0]
    assert (model.name, model.uri) == ("run/task/model", "minio://bucket/model")
    assert json_format.MessageToDict(model.metadata) == metadata

    content = json.loads(text)
    assert set(content) == {"artifacts"}
    # Every declared output is there: kfp.local knows no other. The type is not ours to repeat.
    entry = {"name": "run/task/curves", "uri": "minio://bucket/curves", "metadata": {}}
    assert content["artifacts"]["curves"] == {"artifacts": [entry]}
    assert list(output_file.parent.iterdir()) == [output_file]


def test_a_stage_without_artifacts(output_file: Path) -> None:
    given = json.loads(executor_input(output_file))
    del given["outputs"]["artifacts"]
    write_executor_output(json.dumps(given), {})
    assert json.loads(output_file.read_text(encoding="utf-8")) == {"artifacts": {}}


@pytest.mark.parametrize("value", [None, True, False, ["a"], {"a": 1}, Path("/x"), b"x"])
def test_only_flat_strings_and_numbers(output_file: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="metadata n of model is .*; KFP takes flat strings and numbers only"):
        write_executor_output(executor_input(output_file, "model"), {"model": {"n": value}})
    assert not output_file.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_numbers(output_file: Path, value: float) -> None:
    with pytest.raises(ValueError, match="metadata n of model is .*; KFP takes finite numbers only"):
        write_executor_output(executor_input(output_file, "model"), {"model": {"n": value}})
    assert not output_file.exists()


def test_an_output_that_was_not_declared(output_file: Path) -> None:
    with pytest.raises(ValueError, match="no output artifact is called modle"):
        write_executor_output(executor_input(output_file, "model"), {"modle": {}})
    assert not output_file.exists()


def test_a_failure_keeps_what_was_reported_before(output_file: Path) -> None:
    given = executor_input(output_file, "model")
    write_executor_output(given, {"model": {"n": 1}})
    before = output_file.read_bytes()
    with pytest.raises(ValueError, match="n of model"):
        write_executor_output(given, {"model": {"n": float("nan")}})
    assert output_file.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "{}", '{"outputs": {}}', '{"outputs": null}', '{"outputs": {"outputFile": 3}}']
)
def test_not_an_executor_input(text: str) -> None:
    with pytest.raises(
        InputError, match="--executor-input is not KFP's executor input .*; leave it out when running by hand"
    ):
        write_executor_output(text, {})


def test_a_parameter_is_written_where_kfp_says(tmp_path: Path) -> None:
    """The folder does not exist on a laptop; run by hand there is no path."""
    write_parameter(tmp_path / "new/decision", "promote")
    assert (tmp_path / "new/decision").read_bytes() == b"promote"
    write_parameter(None, "promote")
