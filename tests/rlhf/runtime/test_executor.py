import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components.rlhf.runtime.executor import write_executor_output, write_parameter
from components.rlhf.text.errors import InputError


def executor_input(output_file: Path, *names: str) -> str:
    """The executor input as KFP creates it."""
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


def test_executor_output_passes_strict_parser(output_file: Path) -> None:
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
    # All declared outputs are reported, because kfp.local ignores others; the type is not reported.
    entry = {"name": "run/task/curves", "uri": "minio://bucket/curves", "metadata": {}}
    assert content["artifacts"]["curves"] == {"artifacts": [entry]}
    assert list(output_file.parent.iterdir()) == [output_file]


def test_curve_is_a_list_of_points(output_file: Path) -> None:
    points = [{"confidenceThreshold": 1.5, "recall": 0.0, "falsePositiveRate": 0.0}]
    write_executor_output(executor_input(output_file, "roc"), {"roc": {"confidenceMetrics": points}})
    parsed = pipeline_spec_pb2.ExecutorOutput()
    json_format.Parse(output_file.read_text(encoding="utf-8"), parsed, ignore_unknown_fields=False)
    (roc,) = parsed.artifacts["roc"].artifacts
    assert json_format.MessageToDict(roc.metadata) == {"confidenceMetrics": points}
    for value, words in ((float("inf"), "finite numbers"), (None, "strings and numbers")):
        with pytest.raises(ValueError, match=f"metadata recall of roc, curve is .*; KFP accepts only {words}"):
            write_executor_output(executor_input(output_file, "roc"), {"roc": {"curve": [{"recall": value}]}})


def test_stage_without_artifacts(output_file: Path) -> None:
    content = json.loads(executor_input(output_file))
    del content["outputs"]["artifacts"]
    write_executor_output(json.dumps(content), {})
    assert json.loads(output_file.read_text(encoding="utf-8")) == {"artifacts": {}}


@pytest.mark.parametrize("value", [None, True, False, ["a"], {"a": 1}, Path("/x"), b"x"])
def test_metadata_must_be_strings_and_numbers(output_file: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="metadata n of model is .*; KFP accepts only strings and numbers"):
        write_executor_output(executor_input(output_file, "model"), {"model": {"n": value}})
    assert not output_file.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_metadata_must_be_finite(output_file: Path, value: float) -> None:
    with pytest.raises(ValueError, match="metadata n of model is .*; KFP accepts only finite numbers"):
        write_executor_output(executor_input(output_file, "model"), {"model": {"n": value}})
    assert not output_file.exists()


def test_undeclared_output_is_refused(output_file: Path) -> None:
    with pytest.raises(ValueError, match="modle is not a declared output artifact"):
        write_executor_output(executor_input(output_file, "model"), {"modle": {}})
    assert not output_file.exists()


def test_failed_write_keeps_earlier_output(output_file: Path) -> None:
    text = executor_input(output_file, "model")
    write_executor_output(text, {"model": {"n": 1}})
    before = output_file.read_bytes()
    with pytest.raises(ValueError, match="n of model"):
        write_executor_output(text, {"model": {"n": float("nan")}})
    assert output_file.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", "{}", '{"outputs": {}}', '{"outputs": null}', '{"outputs": {"outputFile": 3}}']
)
def test_invalid_executor_input_is_refused(text: str) -> None:
    with pytest.raises(
        InputError, match="--executor-input is not KFP's executor input .*; omit it when running manually"
    ):
        write_executor_output(text, {})


def test_output_parameter_is_written(tmp_path: Path) -> None:
    """kfp.local does not create the folder; without KFP there is no path."""
    write_parameter(tmp_path / "new/decision", "promote")
    assert (tmp_path / "new/decision").read_bytes() == b"promote"
    write_parameter(None, "promote")
