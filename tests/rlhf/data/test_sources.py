from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from components.rlhf.config.prepare_data import DataSource
from components.rlhf.data.sources import read_rows
from components.rlhf.text.errors import InputError

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(content: bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return to_file


def rows(path: Path, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(found.location, found.row) for found in read_rows(DataSource(path=str(path), **options))]


def error_message(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        rows(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- JSONL ---


def test_jsonl(write: Write) -> None:
    path = write(b'{"prompt": "a", "n": 1}\n{"prompt": "b"}')  # no newline at the end
    assert rows(path) == [(f"{path}:1", {"prompt": "a", "n": 1}), (f"{path}:2", {"prompt": "b"})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.ndjson"])
def test_jsonl_suffixes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"prompt": "a"}\n')
    assert len(rows(tmp_path / name)) == 1


def test_explicit_format_allows_any_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b'{"prompt": "a"}\n')
    assert len(rows(tmp_path / "x.txt", format="jsonl")) == 1


def test_byte_order_mark_is_ignored(write: Write) -> None:
    assert rows(write(b'\xef\xbb\xbf{"prompt": "a"}\n'))[0][1] == {"prompt": "a"}


def test_blank_lines_count_as_lines(write: Write) -> None:
    path = write(b'\n{"prompt": "a"}\r\n   \t\n\n{"prompt": "b"}\n\n')
    assert [location for location, _ in rows(path)] == [f"{path}:2", f"{path}:5"]


def test_non_ascii_text(write: Write) -> None:
    # A Unicode line separator does not end a line, and a surrogate pair is one character.
    path = write('{"prompt": "ü\u2028\u0085"}\n{"prompt": "\\ud83d\\ude00"}\n'.encode())
    assert [row["prompt"] for _, row in rows(path)] == ["ü\u2028\u0085", "\U0001f600"]


def test_empty_file_has_no_rows(write: Write) -> None:
    assert rows(write(b"")) == []


def test_malformed_json_error_has_line_and_column(write: Write) -> None:
    path = write(b'{"prompt": "a"}\n{"prompt" "b"}\n')
    assert (
        error_message(path)
        == f"{path}:2 is not JSON (Expecting ':' delimiter, column 11); each line must be one object."
    )


def test_multi_line_object_is_rejected(write: Write) -> None:
    path = write(b'{\n "prompt": "a"\n}\n')
    assert error_message(path).startswith(f"{path}:1 is not JSON (Expecting property name")


def test_invalid_utf8_error_has_line_and_byte(write: Write) -> None:
    path = write(b'{"prompt": "a"}\n\n{"prompt": "\xfc"}\n')
    assert error_message(path) == f"{path}:3 is not UTF-8 (byte 13 of the line); save the file as UTF-8."


@pytest.mark.parametrize(("content", "kind"), [(b"[1]", "list"), (b'"a"', "str"), (b"null", "NoneType"), (b"3", "int")])
def test_line_that_is_not_an_object_is_rejected(write: Write, content: bytes, kind: str) -> None:
    path = write(b'{"prompt": "a"}\n' + content + b"\n")
    assert error_message(path) == f"{path}:2 is a JSON {kind}; each line must be one object."


@pytest.mark.parametrize("escape", [b"\\ud83d", b"\\udE00", b"a\\ud83d\\u0041"])
def test_unpaired_surrogate_is_rejected(write: Write, escape: bytes) -> None:
    """Neither tokenizers nor UTF-8 can represent it."""
    path = write(b'{"prompt": "a"}\n{"messages": [{"content": "' + escape + b'"}]}\n')
    assert error_message(path).startswith(
        f"{path}:2 is not JSON (it contains a lone UTF-16 surrogate, \\ud800 to \\udfff)"
    )


@pytest.mark.parametrize("content", [b"1" * 5000, b"[" * 100_000], ids=["digits", "brackets"])
def test_json_beyond_parser_limits_is_rejected(write: Write, content: bytes) -> None:
    path = write(b'{"prompt": ' + content + b"}\n")
    assert error_message(path).startswith(f"{path}:1 is ")


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert error_message(path) == f"{path} does not exist; correct the path in the params file."
    assert "does not exist" in error_message(tmp_path / "none.parquet")


def test_folder_with_a_file_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    assert error_message(tmp_path / "x.jsonl").startswith(f"{tmp_path / 'x.jsonl'} has no data files (.jsonl, ")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_bytes(b"prompt\na\n")
    assert error_message(tmp_path / "x.xml") == (
        f"{tmp_path / 'x.xml'}: cannot tell the format from the suffix '.xml'; set format to jsonl, json, csv or parquet."
    )


def test_neither_file_nor_data_set(tmp_path: Path) -> None:
    message = error_message(Path("example/does-not-exist"))
    assert message.startswith("example/does-not-exist is neither an existing file nor a loadable data set (")


# --- columns ---


def test_columns_are_renamed(write: Write) -> None:
    path = write(b'{"question": "q", "answer": "a", "id": 1}\n')
    columns = {"prompt": "question", "completion": "answer"}
    assert rows(path, columns=columns)[0][1] == {"prompt": "q", "completion": "a", "id": 1}


@pytest.mark.parametrize("row", [b'{"prompt": "own", "question": "q"}', b'{"question": "q", "prompt": "own"}'])
def test_renamed_column_takes_precedence_over_existing_one(write: Write, row: bytes) -> None:
    assert rows(write(row), columns={"prompt": "question"})[0][1] == {"prompt": "q"}


def test_columns_can_be_swapped(write: Write) -> None:
    path = write(b'{"chosen": "c", "rejected": "r"}')
    assert rows(path, columns={"chosen": "rejected", "rejected": "chosen"})[0][1] == {"chosen": "r", "rejected": "c"}


def test_one_column_can_map_to_two_fields(write: Write) -> None:
    path = write(b'{"text": "t"}')
    assert rows(path, columns={"prompt": "text", "completion": "text"})[0][1] == {"prompt": "t", "completion": "t"}


def test_missing_column_error_lists_the_found_columns(write: Write) -> None:
    path = write(b'{"qestion": "q", "n": 1}\n{"question": "q"}\n')
    assert error_message(path, columns={"prompt": "question"}) == (
        f"{path}:1 has no column 'question' (found: qestion, n); correct columns in the params file."
    )


def test_later_row_without_the_column_lacks_the_field(write: Write) -> None:
    path = write(b'{"question": "q"}\n{"n": 1}\n')
    assert rows(path, columns={"prompt": "question"}) == [(f"{path}:1", {"prompt": "q"}), (f"{path}:2", {"n": 1})]


def test_dots_lead_into_objects_unless_a_column_has_that_name(write: Write) -> None:
    path = write(b'{"info": {"post": "a"}}\n{"info.post": "b", "info": {"post": "c"}}\n{"info": 3}\n')
    found = rows(path, columns={"prompt": "info.post"})
    assert [row.get("prompt") for _, row in found] == ["a", "b", None]


# --- parquet ---


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    messages = [{"role": "user", "content": "hi"}]
    table = pyarrow.table({"question": ["a", None], "messages": [messages, messages], "margin": [0.5, None]})
    pyarrow.parquet.write_table(table, path)
    assert rows(path, columns={"prompt": "question"}) == [
        (f"{path} row 1", {"prompt": "a", "messages": messages, "margin": 0.5}),
        (f"{path} row 2", {"prompt": None, "messages": messages, "margin": None}),
    ]
    assert "row 1 has no column 'x' (found: question, messages, margin)" in error_message(path, columns={"prompt": "x"})


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_invalid_parquet_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    assert error_message(path).startswith(f"{path} is not a readable parquet file (")
