"""Fuzzed executor input: the output is written atomically, or the input is refused with a readable error message."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.rlhf.runtime.executor import input_metadata, output_uri, write_executor_output
from components.rlhf.text.errors import InputError
from tests.support.hostile_input import result_or_refusal

FUZZ = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


def valid_input(folder: Path) -> dict[str, Any]:
    metadata = {"published_uri": "s3://b/m"}
    entry = {
        "artifacts": [
            {"name": "m", "uri": "s3://bucket/m", "metadata": metadata, "type": {"schemaTitle": "system.Model"}}
        ]
    }
    return {
        "inputs": {"artifacts": {"policy": entry}},
        "outputs": {"artifacts": {"model": entry}, "outputFile": str(folder / "out/executor_output.json")},
    }


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(nested for key, inner in items for nested in paths_in(inner, (*path, key)))]


@FUZZ
@given(data=st.data())
def test_fuzzed_executor_input_is_accepted_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content: Any = valid_input(tmp_path)
    # outputFile may be any path by design; the test keeps it in its folder.
    keys = data.draw(st.sampled_from([path for path in paths_in(content) if path[-1:] != ("outputFile",)]))
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    if not keys:
        content = data.draw(JSON)
    elif data.draw(st.booleans()):
        parent[keys[-1]] = data.draw(JSON)
    else:
        del parent[keys[-1]]
    text = json.dumps(content)

    result_or_refusal(lambda: write_executor_output(text, {}))
    for read in (lambda: input_metadata(text, "policy", "published_uri"), lambda: output_uri(text, "model")):
        uri = result_or_refusal(read)
        assert uri is None or isinstance(uri, str)
    assert not list(tmp_path.rglob("*.writing"))


@FUZZ
@given(st.text() | st.just("[" * 100_000))
def test_any_text_is_refused(text: str) -> None:
    assert result_or_refusal(lambda: write_executor_output(text, {})) is None


@pytest.mark.parametrize("name", ["", "a\0b", 5, None, [], "a\nb"])
def test_invalid_output_file_is_refused(tmp_path: Path, name: Any) -> None:
    content = valid_input(tmp_path)
    content["outputs"]["outputFile"] = name
    with pytest.raises(InputError, match="is not KFP's executor input"):
        write_executor_output(json.dumps(content), {})
