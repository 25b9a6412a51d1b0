"""Reads files of records in bounded memory: JSON lines, a JSON array, CSV and parquet, each row with its location."""

import csv
import gzip
import io
import math
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

Row = dict[str, Any]
MAX_LINE_BYTES = 16 * 2**20  # far longer than any model's context, and small enough to read into memory
MAX_ROW_GROUP_BYTES = 4 * 2**30
MAX_UNPACKED_BYTES = 64 * 2**30  # of a compressed file
CHUNK_BYTES = 2**20
BOM = b"\xef\xbb\xbf"


def check_readable(path: Path) -> None:
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


class _Unpacked(io.RawIOBase):
    """A gzip stream that raises OSError beyond MAX_UNPACKED_BYTES."""

    def __init__(self, path: Path) -> None:
        self._file, self._remaining = gzip.GzipFile(path), MAX_UNPACKED_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), CHUNK_BYTES))
        self._remaining -= len(data)
        if self._remaining < 0:
            raise OSError(f"it unpacks to more than {MAX_UNPACKED_BYTES // 2**30} GiB")
        buffer[: len(data)] = data
        return len(data)


def _open(path: Path) -> IO[bytes]:
    check_readable(path)
    return io.BufferedReader(_Unpacked(path), CHUNK_BYTES) if path.suffix == ".gz" else path.open("rb")


def read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (location, object) of a file of JSON lines or of one JSON array. Raises InputError with the location."""
    try:
        with _open(path) as file:
            start = file.peek(4096) if isinstance(file, io.BufferedReader) else b""
            is_array = start.removeprefix(BOM).lstrip()[:1] == b"["
            yield from _read_array(path, file) if is_array else _read_lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be unpacked ({error}); save it again.") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (file:line, object) of every non-blank line, in bounded memory. Raises InputError with the location."""
    with _open(path) as file:
        yield from _read_lines(path, file)


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        location = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{location} is longer than {MAX_LINE_BYTES // 2**20} MiB; each line must be one record.")
        if line.strip():
            line = line.removeprefix(BOM) if number == 1 else line
            if number == 1 and line.strip() in (b"{", b"[") and path.suffixes[:1] != [".jsonl"]:
                raise InputError(
                    f"{location} begins one object that spans several lines; write one object per line, or a list of objects."
                )
            yield location, _parse(location, line, "each line must be one object")


def _parse(location: str, text: bytes, advice: str) -> Row:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location} is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8."
        ) from None
    try:
        row = parse_json(text)
    except NotJsonError as error:
        raise InputError(f"{location} is not JSON ({error}); {advice}.") from None
    if not isinstance(row, dict):
        raise InputError(f"{location} is a JSON {type(row).__name__}; {advice}.")
    return row


STRUCTURE = re.compile(rb'["\\{}\[\],]')


def _read_array(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    """Yield (`file item N`, object) of a JSON array. Elements are found by their brackets, and then parsed one by one."""
    element, number, depth, in_string, is_escaped = bytearray(), 0, 0, False, False
    advice = "each item of the list must be one object"
    while chunk := file.read(CHUNK_BYTES):
        position = 0
        if is_escaped:  # the character after a backslash at the end of the last chunk
            position, is_escaped = 1, False
        begin = 0
        while True:
            found = STRUCTURE.search(chunk, position)
            if found is None:
                break
            mark, position = found[0], found.end()
            if in_string:
                if mark == b"\\":
                    position += 1
                    is_escaped = position > len(chunk)
                in_string = mark != b'"'
                continue
            if mark == b'"':
                in_string = True
            elif mark in (b"{", b"["):
                depth += 1
                if depth == 1:
                    begin = position  # the array itself begins
                    element.clear()
            elif mark in (b"}", b"]"):
                depth -= 1
            if (mark == b"," and depth == 1) or depth == 0:
                element += chunk[begin : position - 1]
                begin = position
                if depth == 0 and mark != b"]":
                    raise InputError(
                        f"{path} closes its list with the wrong bracket after item {number}; save it again."
                    )
                if element.strip() or mark == b"," or number:
                    number += 1
                    yield f"{path} item {number}", _parse(f"{path} item {number}", bytes(element), advice)
                element.clear()
                if depth == 0:
                    rest = chunk[position:]
                    while not rest.strip() and (rest := file.read(CHUNK_BYTES)):
                        pass
                    if rest.strip():
                        raise InputError(
                            f"{path} goes on after its list; write one list of objects, or one object per line."
                        )
                    return
        element += chunk[begin:]
        if len(element) > MAX_LINE_BYTES:
            raise InputError(
                f"{path} item {number + 1} is longer than {MAX_LINE_BYTES // 2**20} MiB; each item must be one record."
            )
    raise InputError(f"{path} ends within its list, after item {number}; save the file again.")


def read_csv(path: Path, *, delimiter: str) -> Iterator[tuple[str, Row]]:
    """Yield (file:line, row) of a table with a header. Every value is a text."""
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            budget = [MAX_LINE_BYTES]  # characters left for the current record
            rows = csv.reader(_bounded_lines(path, text, budget), delimiter=delimiter, strict=True)
            header = next(rows, None)
            if not header:
                return
            if len(set(header)) < len(header):
                raise InputError(f"{path}:1 has two columns of the same name; rename one.")
            for row in rows:
                budget[0] = MAX_LINE_BYTES
                if row and len(row) != len(header):
                    raise InputError(
                        f"{path}:{rows.line_num} has {len(row)} cells, and the header {len(header)}; quote cells that contain "
                        f"{delimiter!r}."
                    )
                if row:
                    yield f"{path}:{rows.line_num}", dict(zip(header, row, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}); save the file as UTF-8.") from None
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a readable table ({error}); save it again.") from None


def _bounded_lines(path: Path, text: io.TextIOWrapper, budget: list[int]) -> Iterator[str]:
    """The lines of a table. Raises InputError when the record that they belong to exceeds the budget."""
    while line := text.readline(MAX_LINE_BYTES + 1):
        budget[0] -= len(line)
        if budget[0] < 0:
            raise InputError(
                f"{path} has a record longer than {MAX_LINE_BYTES // 2**20} MiB; close the quotes of its cells."
            )
        yield line


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (`file row N`, row). Missing numbers that pandas wrote as NaN are null."""
    check_readable(path)
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
                yield f"{path} row {number}", without_nan(row)
    except InputError:
        raise
    except Exception as error:  # errors of Arrow, and of conversions to Python such as dates or invalid UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a readable parquet file ({reason}, after row {number}).") from None


def without_nan(value: Any) -> Any:
    """The value with null for every NaN, at any depth."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list) else value
