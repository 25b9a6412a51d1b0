"""KFP's executor input, broken in every way: the output is written whole, or one sentence says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.rlhf.runtime.executor import input_uri, output_uri, write_executor_output
from components.rlhf.text.errors import InputError
from tests.support.hostile_input import result_or_refusal

FUZZ = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


def good(folder: Path) -> dict[str, Any]:
    entry = {
        "artifacts": [{"name": "m", "uri": "s3://bucket/m", "metadata": {}, "type": {"schemaTitle": "system.Model"}}]
    }
    return {
        "inputs": {"artifacts": {"policy": entry}},
        "outputs": {"artifacts": {"model": entry}, "outputFile": str(folder / "out/executor_output.json")},
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


@FUZZ
@given(data=st.data())
def test_anything_in_any_place(tmp_path: Path, data: st.DataObject) -> None:
    content: Any = good(tmp_path)
    # A file somewhere else is for whoever passes the executor input to choose; here it stays in this folder.
    ways = [way for way in places(content) if way[-1:] != ("outputFile",)]
    way = data.draw(st.sampled_from(ways))
    holder = content
    for key in way[:-1]:
        holder = holder[key]
    if not way:
        content = data.draw(JSON)
    elif data.draw(st.booleans()):
        holder[way[-1]] = data.draw(JSON)
    else:
        del holder[way[-1]]
    text = json.dumps(content)

    result_or_refusal(lambda: write_executor_output(text, {}))
    for read, name in ((input_uri, "policy"), (output_uri, "model")):
        uri = result_or_refusal(lambda read=read, name=name: read(text, name))
        assert uri is None or isinstance(uri, str)
    assert not list(tmp_path.rglob("*.writing"))


@FUZZ
@given(st.text() | st.just("[" * 100_000))
def test_any_text(text: str) -> None:
    assert result_or_refusal(lambda: write_executor_output(text, {})) is None


@pytest.mark.parametrize("name", ["", "a\0b", 5, None, [], "a\nb"])
def test_an_output_file_that_is_no_path(tmp_path: Path, name: Any) -> None:
    content = good(tmp_path)
    content["outputs"]["outputFile"] = name
    with pytest.raises(InputError, match="is not KFP's executor input"):
        write_executor_output(json.dumps(content), {})
