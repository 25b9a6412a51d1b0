"""Any text is parsed or refused with one type of error; JSON that parsers disagree on is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.text.strict_json import NotJsonError, parse_json
from tests.support.hostile_input import result_or_refusal

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=1000, deadline=None)
@given(st.text(st.characters()) | st.binary() | VALUES.map(json.dumps) | st.text('{}[]",:0123456789eE+-\\ud8NaIty '))
def test_any_text_is_parsed_or_refused(text: str | bytes) -> None:
    value = result_or_refusal(lambda: parse_json(text), NotJsonError)
    assert value is None or parse_json(json.dumps(value, ensure_ascii=False)) == value


@settings(max_examples=500, deadline=None)
@given(VALUES)
def test_valid_json_is_parsed(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is duplicated"),
        ('[{"x": {"b": 1, "b": 1}}]', "the key 'b' is duplicated"),
        ("[NaN]", "NaN is not a JSON number"),
        ("1e999", "the number 1e999 is too large"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ("[" * 200_000, "it is nested too deeply"),
        ("1" * 5000, "a number has thousands of digits"),
        ('"\\ud800"', "it contains a lone UTF-16 surrogate, \\ud800 to \\udfff"),
        ('"\ud800"', "it contains a lone UTF-16 surrogate, \\ud800 to \\udfff"),
        (b"\xff", "not UTF-8, byte 1"),
        (b"\xef\xbb\xbf1", "Unexpected UTF-8 BOM (decode using utf-8-sig), column 1"),
        ("{\n1", "Expecting property name enclosed in double quotes, line 2, column 1"),
    ],
)  # fmt: skip
def test_non_strict_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(NotJsonError) as caught:
        parse_json(text)
    assert str(caught.value) == message
