"""Reads the rows of a source: files, folders and globs of files, and Hugging Face data sets."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.rlhf.config.prepare_data import DataSource, is_glob
from components.rlhf.data.files import Row, check_readable, read_csv, read_json, read_parquet, without_nan
from components.rlhf.text.errors import InputError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
METADATA = ("dataset_infos.json", "dataset_info.json", "config.json")  # in repositories of data sets
SAVED_DATA_SET = ("state.json", "dataset_dict.json")  # in a folder that datasets' save_to_disk wrote


def suffix_of(path: str) -> str:
    """The suffix that tells the format, without .gz."""
    return Path(path.removesuffix(".gz")).suffix


@dataclass(frozen=True)
class SourceRow:
    """A row of a source, with source.columns renamed, and the columns of source.keep that it has, under their own names."""

    location: str  # file:line, file item N or file row N
    row: Row
    kept: Row


def read_rows(source: DataSource) -> Iterator[SourceRow]:
    """Yield every row of a source.

    Raises InputError with the location of a row that cannot be read, and if the first row lacks a column of source.columns; a later
    row that lacks it has no such field.
    """
    is_first = True
    for location, row in _read_source(source):
        found = {field: _column(row, column) for field, column in source.columns.items()}
        missing = [source.columns[field] for field, value in found.items() if value is _MISSING]
        if missing and is_first:
            raise InputError(
                f"{location} has no column {missing[0]!r} (found: {', '.join(row)}); correct columns in the params file."
            )
        is_first = False
        # A renamed column takes precedence over one that already has that field name.
        others = {name: value for name, value in row.items() if name not in source.columns.values()}
        renamed = others | {field: value for field, value in found.items() if value is not _MISSING}
        kept = {column: _column(row, column) for column in source.keep}
        yield SourceRow(location, renamed, {name: value for name, value in kept.items() if value is not _MISSING})


_MISSING = object()


def _column(row: Row, column: str) -> Any:
    """The value of a column, or with dots in its name, of a field in nested objects."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _read_source(source: DataSource) -> Iterator[tuple[str, Row]]:
    path = source.path
    if source.format == "hub":
        yield from _read_hub(source)
    elif is_glob(path) and not os.path.exists(path):
        files = sorted(n for n in glob.glob(path, recursive=True) if _is_data(Path(n)) and not n.endswith(".md"))
        if not files:
            raise InputError(f"{path} matches no file; correct the path.")
        for name in files:
            yield from _read_file(source, Path(name))
    elif os.path.isdir(path):
        yield from _read_folder(source, Path(path))
    elif source.format != "auto" or suffix_of(path) in FORMATS or os.path.exists(path):
        yield from _read_file(source, Path(path))
    else:
        yield from _read_hub(source)


def _is_data(path: Path) -> bool:
    """Whether a path is a file, or a broken link, which is refused when it is read instead of being left out."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _read_folder(source: DataSource, folder: Path) -> Iterator[tuple[str, Row]]:
    """All data files of a folder, by their paths; or a data set that the datasets library describes or has saved."""
    if any((folder / name).is_file() for name in SAVED_DATA_SET):
        yield from _read_saved(source, folder)
        return
    if source.config is not None or _describes_configs(folder):
        yield from _read_hub(source)
        return
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if _is_data(file)
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        and (source.format != "auto" or suffix_of(file.name) in FORMATS)
        and file.suffix != ".md"
        and file.name not in METADATA
    ]
    if not files:
        raise InputError(f"{folder} has no data files ({', '.join(FORMATS)}); correct the path.")
    for file in files:
        yield from _read_file(source, file)


def _describes_configs(folder: Path) -> bool:
    """Whether the folder has the layout of a repository on the Hub, with a README.md that says which files are which."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            head = file.read(2**16)
    except (OSError, UnicodeDecodeError):
        return False
    return head.startswith("---") and "\nconfigs:" in head.split("\n---", 1)[0]


def _read_file(source: DataSource, path: Path) -> Iterator[tuple[str, Row]]:
    file_format = source.format if source.format != "auto" else FORMATS.get(suffix_of(path.name))
    if file_format is None:
        raise InputError(
            f"{path}: cannot tell the format from the suffix {path.suffix!r}; set format to jsonl, json, csv or parquet."
        )
    if path.is_dir():
        check_readable(path)
    match file_format:
        case "parquet":
            yield from read_parquet(path)
        case "csv":
            yield from read_csv(path, delimiter="\t" if suffix_of(path.name) == ".tsv" else ",")
        case _:
            yield from read_json(path)


def _read_saved(source: DataSource, folder: Path) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        for part in saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]:
            part.data.table.validate(full=True)  # reading a corrupt table can crash the process
    except Exception as error:  # a broken folder raises many types
        raise InputError(f"{folder} is not a data set that can be loaded ({_reason(error)}); save it again.") from error
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise InputError(f"{folder} has no split {source.split!r}; splits: {', '.join(map(str, saved))}.")
        saved = saved[source.split]
    yield from _rows_of(source, saved)


def _read_hub(source: DataSource) -> Iterator[tuple[str, Row]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source.path, name=source.config, split=source.split, streaming=False)
    except Exception as error:  # the library raises many types for a wrong id, a wrong split or a network failure
        raise InputError(
            f"{source.path} is neither an existing file nor a loadable data set ({_reason(error)}); correct the path, config or "
            "split."
        ) from error
    yield from _rows_of(source, rows)


def _reason(error: Exception) -> str:
    """The message of an error in one line, with the names of configurations and splits that some libraries put into the next."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def _rows_of(source: DataSource, rows: Any) -> Iterator[tuple[str, Row]]:
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{source.path} row {number}", without_nan(dict(row))
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # such as an image that cannot be decoded
        raise InputError(f"{source.path} has a row that cannot be read ({_reason(error)}).") from error
