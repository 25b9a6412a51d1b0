"""Reading rows from a file or a data set, each with the place it came from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.rlhf.config.data import DataSource
from components.rlhf.errors import InputError

Row = dict[str, Any]


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
            yield from _read_jsonl(path)
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
    if Path(source.path).exists():
        raise InputError(f"{source.path}: the ending {suffix!r} says no format; set format to jsonl or parquet.")
    return "hub"


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; correct the path in the params file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); make it a readable file.") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    _check_readable(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{place} is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
                ) from None
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{place} is not JSON ({error.msg}, column {error.colno}); each line must be one object."
                ) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise InputError(f"{place} is JSON that cannot be read ({error}); correct the line.") from None
            if not isinstance(row, dict):
                raise InputError(f"{place} is a JSON {type(row).__name__}; each line must be one object.")
            if b"\\u" in line and _is_torn(row):
                raise InputError(
                    f"{place} holds half of a UTF-16 surrogate pair (\\ud800 to \\udfff); correct the text."
                )
            yield place, row


def _is_torn(row: Row) -> bool:
    """Whether any text in it is no Unicode: JSON can escape one half of a pair, which no tokenizer and no file takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    _check_readable(path)
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}).") from None


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
