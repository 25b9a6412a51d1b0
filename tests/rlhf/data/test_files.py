"""Files of every format, folders, globs and data sets are read row by row, each with its location."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import components.rlhf.data.files as files
from components.rlhf.config.prepare_data import DataSource
from components.rlhf.data.sources import read_rows
from components.rlhf.text.errors import InputError

ROWS = [{"prompt": 'a, "b" ] } \\', "n": 1}, {"prompt": "[é]\n", "n": 2}, {"prompt": '\\\\"', "n": 3}]


def read(path: Path | str, **source: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(found.location, found.row) for found in read_rows(DataSource(path=str(path), **source))]


def error(path: Path | str, **source: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **source)
    return str(caught.value)


# --- JSON arrays ---


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
def test_json_array(tmp_path: Path, indent: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks in which the file is read."""
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    path = tmp_path / "x.json"
    path.write_text("\ufeff \n" + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path) == [(f"{path} item {n}", row) for n, row in enumerate(ROWS, start=1)]


def test_json_lines_and_arrays_have_any_json_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"n": 1}\n{"n": 2}\n')
    (tmp_path / "y.jsonl").write_text('[{"n": 1}, {"n": 2}]')
    assert [row["n"] for name in ("x.json", "y.jsonl") for _, row in read(tmp_path / name)] == [1, 2, 1, 2]
    (tmp_path / "z.json").write_text(" [ ] ")
    assert read(tmp_path / "z.json") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, 3]', " item 2 is a JSON int; each item of the list must be one object."),
        ('[{"a": 1}, {"a": NaN}]', " item 2 is not JSON"),
        ('[{"a": 1},', " ends within its list, after item 1; save the file again."),
        ('[{"a": "b', " ends within its list, after item 0; save the file again."),
        ('[{"a": 1}] [1]', " goes on after its list;"),
        ('[{"a": 1},,{"a": 1}]', " item 2 is not JSON"),
        ('[{"a": [1}]]', " item 1 is not JSON"),
        (
            '{\n  "data": []\n}',
            ":1 begins one object that spans several lines; write one object per line, or a list of objects.",
        ),
    ],
)
def test_broken_array_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert error(path).startswith(f"{path}{message}")


def test_long_item_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, {"a": "' + "x" * 2**22 + '"}]')
    assert error(path) == f"{path} item 2 is longer than 1 MiB; each item must be one record."


# --- compressed files ---


def test_compressed_files(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for name, content in (
        ("x.jsonl.gz", lines),
        ("y.json.gz", json.dumps(ROWS).encode()),
        ("z.csv.gz", b"n\n1\n2\n3\n"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert [int(row["n"]) for _, row in read(tmp_path / name)] == [1, 2, 3]


def test_corrupt_and_huge_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"n": 1}\n' * 1000)[:-20])
    assert error(path).startswith(f"{path} cannot be unpacked (")
    path.write_bytes(b"nonsense")
    assert error(path).startswith(f"{path} cannot be unpacked (")
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 2**20)
    path.write_bytes(gzip.compress(b'{"n": 1}\n' * 200_000))
    assert error(path) == f"{path} cannot be unpacked (it unpacks to more than 0 GiB); save it again."


# --- tables ---


def test_csv_and_tsv(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('\ufeffprompt,n\n"a, ""b""\nc",1\n\né,\n', encoding="utf-8")
    path = tmp_path / "x.csv"
    assert read(path) == [(f"{path}:3", {"prompt": 'a, "b"\nc', "n": "1"}), (f"{path}:5", {"prompt": "é", "n": ""})]
    (tmp_path / "x.tsv").write_text("prompt\tn\na,b\t1\n")
    assert [row for _, row in read(tmp_path / "x.tsv")] == [{"prompt": "a,b", "n": "1"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1,2,3\n", ":3 has 3 cells, and the header 2; quote cells that contain ','."),
        (b"a,a\n1,2\n", ":1 has two columns of the same name; rename one."),
        (b"a\n\xff\n", " is not UTF-8"),
        (b'a\n"x\n', " is not a readable table"),
    ],
)
def test_broken_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    assert error(path).startswith(f"{path}{message}")


def test_nan_in_parquet_is_null(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"margin": [1.5, float("nan")], "nested": [{"scores": [float("nan"), 2.0]}, None]})
    pyarrow.parquet.write_table(table, path)
    assert [row for _, row in read(path)] == [
        {"margin": 1.5, "nested": {"scores": [None, 2.0]}},
        {"margin": None, "nested": None},
    ]


# --- folders, globs and data sets ---


def test_folder_and_glob_of_shards(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b" / "2.jsonl").write_text('{"n": 3}\n')
    (tmp_path / "1.json").write_text('[{"n": 1}, {"n": 2}]')
    (tmp_path / ".cache" / "x.jsonl").write_text('{"n": 9}\n')
    (tmp_path / "README.md").write_text("# Data\n")
    (tmp_path / "_meta.json").write_text('{"n": 9}\n')
    assert [row["n"] for _, row in read(tmp_path)] == [1, 2, 3]
    assert [row["n"] for _, row in read(tmp_path / "b" / "*.jsonl")] == [3]
    assert [row["n"] for _, row in read(tmp_path / "[0-9].json")] == [1, 2]
    assert error(tmp_path / "*.csv") == f"{tmp_path / '*.csv'} matches no file; correct the path."
    with pytest.raises(ValueError, match="is a pattern, which S3 does not have; give the prefix of the files"):
        DataSource(path="s3://bucket/*.jsonl")


def test_broken_link_is_refused_and_not_left_out(tmp_path: Path) -> None:
    """As when a mount is missing: half of the data would be gone."""
    (tmp_path / "1.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "2.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        assert error(path) == f"{tmp_path / '2.jsonl'} does not exist; correct the path in the params file."


def test_explicit_format_applies_to_every_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "part-0").write_text('{"n": 1}\n')
    (tmp_path / "part-1").write_text('{"n": 2}\n')
    assert [row["n"] for _, row in read(tmp_path, format="jsonl")] == [1, 2]
    assert "has no data files" in error(tmp_path)


def hub_layout(folder: Path) -> Path:
    """A folder in the layout of a repository on the Hub, with two configurations."""
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: good\n  data_files:\n  - split: test\n    path: good.jsonl\n"
        "- config_name: bad\n  data_files: bad.jsonl\n---\n# A data set\n"
    )
    (folder / "good.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    (folder / "bad.jsonl").write_text('{"n": 3}\n')
    return folder


def test_data_set_with_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    folder = hub_layout(tmp_path / "data")
    assert [row["n"] for _, row in read(folder, config="good", split="test")] == [1, 2]
    assert [row["n"] for _, row in read(folder, config="bad")] == [3]
    assert "good" in error(folder) and "bad" in error(folder)
    assert "test" in error(folder, config="good")


def test_saved_data_set(tmp_path: Path) -> None:
    import datasets

    train, test = (datasets.Dataset.from_list([{"n": n}]) for n in (1, 2))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    assert [row["n"] for _, row in read(tmp_path / "both", split="test")] == [2]
    assert [row["n"] for _, row in read(tmp_path / "one")] == [1]
    assert error(tmp_path / "both", split="dev") == f"{tmp_path / 'both'} has no split 'dev'; splits: train, test."


@pytest.mark.parametrize("text", ['[{"a": 1}}', '[{"a": 1},]', '[{"a": 1}]' + " " * 2**21 + "x"])
def test_array_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert error(path).startswith(str(path))


def test_metadata_of_a_repository_is_not_data(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert [row["n"] for _, row in read(tmp_path)] == [1]


def test_record_of_a_table_with_unclosed_quotes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "1,2\n" * 1000)
    assert len(read(path)) == 1000
    path.write_text("a,b\n" + '"1","\n' * 1000)
    assert error(path).startswith(f"{path} ")
    path.write_text("a,b\n1," + '"' + "x\n" * 1000)
    assert error(path).startswith(f"{path} has a record longer than")


def test_pattern_of_files_leaves_out_the_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Data\n")
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n')
    assert [row["n"] for _, row in read(tmp_path / "*")] == [1]
