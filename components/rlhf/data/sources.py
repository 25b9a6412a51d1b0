"""Reading rows from a file or a data set, each with the place it came from."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.rlhf.config.prepare_data import DataSource
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

Row = dict[str, Any]
MAX_LINE_BYTES = 16 * 2**20  # of one record: far longer than any model reads, and still read in bounded memory
MAX_ROW_GROUP_BYTES = 4 * 2**30


def read_rows(source: DataSource) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a JSONL file, a parquet file or a Hugging Face data set, columns renamed to our field names.

    place is `file:line` or `file row N`. Raises InputError with the place for whatever cannot be read.
    """
    for place, row in _rows(source):
        missing = [theirs for theirs in source.columns.values() if theirs not in row]
        if missing:
            raise InputError(
                f"{place} has no column {missing[0]!r} (columns there: {', '.join(row)}); correct columns in the params file."
            )
        # What was renamed wins over a column that happens to have our name already.
        others = {name: value for name, value in row.items() if name not in source.columns.values()}
        yield place, others | {ours: row[theirs] for ours, theirs in source.columns.items()}


def _rows(source: DataSource) -> Iterator[tuple[str, Row]]:
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
    if os.path.exists(source.path):  # of a name that no file can have it says no
        raise InputError(f"{source.path}: the ending {suffix!r} says no format; set format to jsonl or parquet.")
    return "hub"


def _check_readable(path: Path) -> None:
    """Raise InputError unless it is an ordinary file: opening a pipe would wait, and a device never ends."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise InputError(f"{path} is a pipe or a device; save what it gives as an ordinary file.")
        with path.open("rb"):
            return
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; correct the path in the params file.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read ({reason}); make it a readable file.") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (file:line, object) of every line that is not blank, in bounded memory. Raises InputError with the place."""
    _check_readable(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{place} is longer than {MAX_LINE_BYTES // 2**20} MiB; each line must be one record.")
            if line.strip():
                yield place, _parse(place, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _parse(place: str, line: bytes) -> Row:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
        ) from None
    try:
        row = parse_json(line)
    except NotJsonError as error:
        raise InputError(f"{place} is not JSON ({error}); each line must be one object.") from None
    if not isinstance(row, dict):
        raise InputError(f"{place} is a JSON {type(row).__name__}; each line must be one object.")
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
                    "write the file again with smaller ones."
                )
        # Few rows at a time: a text that thousands of rows share is stored once, and expanded here.
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except InputError:
        raise
    except Exception as error:  # Arrow's own, and whatever Python cannot hold: a date, a text that is no UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a readable parquet file ({reason}, after row {number}).") from None


def _read_hub(source: DataSource) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, split=source.split, streaming=False)
    except Exception as error:  # the library raises many types for a wrong id, a wrong split and a dead network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source.path} is neither a file here nor a data set that could be loaded ({reason}); correct the path."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source.path} row {number}", dict(row)
