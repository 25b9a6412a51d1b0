"""Reads rows from a file or a data set, each with its location."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.rlhf.config.prepare_data import DataSource
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

Row = dict[str, Any]
MAX_LINE_BYTES = 16 * 2**20  # far longer than any model's context, and small enough to read into memory
MAX_ROW_GROUP_BYTES = 4 * 2**30


def read_rows(source: DataSource) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) of a JSONL file, a parquet file or a Hugging Face data set, with source.columns renamed.

    location is `file:line` or `file row N`. Raises InputError with the location of a row that cannot be read.
    """
    for location, row in _read_source(source):
        missing = [column for column in source.columns.values() if column not in row]
        if missing:
            raise InputError(
                f"{location} has no column {missing[0]!r} (found: {', '.join(row)}); correct columns in the params file."
            )
        # A renamed column takes precedence over one that already has that field name.
        others = {name: value for name, value in row.items() if name not in source.columns.values()}
        yield location, others | {field: row[column] for field, column in source.columns.items()}


def _read_source(source: DataSource) -> Iterator[tuple[str, Row]]:
    path = Path(source.path)
    match _format_of(source):
        case "jsonl":
            yield from read_jsonl(path)
        case "parquet":
            yield from _read_parquet(path)
        case _:
            yield from _read_hub(source)


def _format_of(source: DataSource) -> str:
    if source.format != "auto":
        return source.format
    suffix = Path(source.path).suffix
    if suffix in (".jsonl", ".json", ".ndjson"):
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    if os.path.exists(source.path):  # unlike Path.exists, False for an invalid file name
        raise InputError(
            f"{source.path}: cannot tell the format from the suffix {suffix!r}; set format to jsonl or parquet."
        )
    return "hub"


def _check_readable(path: Path) -> None:
    """Raise InputError unless path is a readable regular file: opening a pipe would block, and a device has no end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise InputError(f"{path} is a pipe or a device; save its content as a regular file.")
        with path.open("rb"):
            return
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; correct the path in the params file.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason}); make it a readable file.") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (file:line, object) of every non-blank line, in bounded memory. Raises InputError with the location."""
    _check_readable(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            location = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(
                    f"{location} is longer than {MAX_LINE_BYTES // 2**20} MiB; each line must be one record."
                )
            if line.strip():
                yield location, _parse(location, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _parse(location: str, line: bytes) -> Row:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location} is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
        ) from None
    try:
        row = parse_json(line)
    except NotJsonError as error:
        raise InputError(f"{location} is not JSON ({error}); each line must be one object.") from None
    if not isinstance(row, dict):
        raise InputError(f"{location} is a JSON {type(row).__name__}; each line must be one object.")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    _check_readable(path)
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.metadata.num_row_groups):
            if file.metadata.row_group(group).total_byte_size > MAX_ROW_GROUP_BYTES:
                raise InputError(
                    f"{path}: row group {group + 1} is larger than {MAX_ROW_GROUP_BYTES // 2**30} GiB; "
                    "write the file again with smaller row groups."
                )
        # A small batch bounds memory: a text shared by thousands of rows is stored once and expanded here.
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except InputError:
        raise
    except Exception as error:  # errors of Arrow, and of conversions to Python such as dates or invalid UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a readable parquet file ({reason}, after row {number}).") from None


def _read_hub(source: DataSource) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, split=source.split, streaming=False)
    except Exception as error:  # the library raises many types for a wrong id, a wrong split or a network failure
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source.path} is neither an existing file nor a loadable data set ({reason}); correct the path."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source.path} row {number}", dict(row)
