"""Columns of the source that stay with each prompt, in every format, through the split and on disk."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from components.rlhf.config.prepare_data import DataConfig, DataSource
from components.rlhf.data.datasets import load_records, save_records
from components.rlhf.data.reading import kept_columns, read_examples
from components.rlhf.data.records import Prompt, ValidationSample
from components.rlhf.data.sources import SourceRow
from components.rlhf.data.tally import Tally
from components.rlhf.text.errors import InputError

ROWS = [{"prompt": f"{n} + 1 =", "answer": n + 1, "unit": "m"} for n in range(4)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def columns(path: Path, **options: Any) -> list[dict[str, str]]:
    source, tally = DataSource(path=str(path), **options), Tally(name="data.prompts")
    return [dict(example.columns) for _, example in read_examples("prompts", source, tally)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "saved"])
def test_every_format_keeps_columns_as_text(kind: str, tmp_path: Path) -> None:
    kept = columns(write(tmp_path, kind), keep=["answer", "unit"])
    assert kept == [{"answer": str(n + 1), "unit": "m"} for n in range(4)]


def test_hub_data_sets_keep_columns(tmp_path: Path) -> None:
    """A folder in the layout of the Hub is read by the same function as a data set of the Hub."""
    write(tmp_path, "jsonl")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data.jsonl\n---\n")
    assert columns(tmp_path, format="hub", keep=["answer"]) == [{"answer": str(n + 1)} for n in range(4)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("18", "18"),
        (" 18\n", " 18\n"),
        (18, "18"),
        (1.5, "1.5"),
        (True, "true"),
        ([1, "é"], '[1, "é"]'),
        ({"a": None}, '{"a": null}'),
    ],
)
def test_text_stays_and_other_values_become_their_json(value: Any, text: str) -> None:
    assert kept_columns(["answer"], SourceRow("f:1", {}, {"answer": value})) == {"answer": text}


@given(st.recursive(st.integers() | st.booleans() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_json_text_of_any_value_is_that_value(value: Any) -> None:
    kept = {} if isinstance(value, str) else kept_columns(["a"], SourceRow("f:1", {}, {"a": value}))
    assert isinstance(value, str) or json.loads(kept["a"]) == value


def test_columns_have_their_own_names_even_where_they_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "1 + 1 =", "prompt": "other", "meta": {"truth": "2"}}\n')
    kept = columns(path, columns={"prompt": "question"}, keep=["question", "prompt", "meta.truth"])
    assert kept == [{"question": "1 + 1 =", "prompt": "other", "meta.truth": "2"}]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "2 ="}, "is missing (found: prompt)"),
        ({"prompt": "2 =", "answer": None}, "is empty"),
        ({"prompt": "2 =", "answer": " "}, "is empty"),
    ],
)
def test_record_without_the_column_is_not_used_and_says_why(
    record: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path, tally = tmp_path / "d.jsonl", Tally(name="data.prompts")
    path.write_text('{"prompt": "1 =", "answer": "1"}\n' + json.dumps(record) + "\n")
    read = list(read_examples("prompts", DataSource(path=str(path), keep=("answer",)), tally))
    assert [example.columns for _, example in read] == [{"answer": "1"}]
    assert tally.first == {
        "no column 'answer' to keep": f"{path}:2: the column 'answer', which keep names, {problem}; correct keep or the data."
    }
    tally.kept = len(read)
    with pytest.raises(InputError, match=r"only 1 of 2 records are usable.*which keep names"):
        tally.require_usable()


def test_kept_columns_count_as_read(tmp_path: Path) -> None:
    tally = Tally(name="data.prompts")
    list(read_examples("prompts", DataSource(path=str(write(tmp_path, "jsonl")), keep=("answer",)), tally))
    assert tally.unread_columns == {"unit"}


# --- on disk ---


def test_prompt_without_columns_is_written_as_before(tmp_path: Path) -> None:
    save_records(tmp_path, "train", [Prompt(prompt="a", id="train-0")])
    assert (tmp_path / "train.jsonl").read_text() == '{"prompt": "a", "id": "train-0", "conversation": null}\n'
    assert load_records(tmp_path, "train", Prompt) == [Prompt(prompt="a", id="train-0")]


def test_columns_survive_in_prompts_and_in_validation_samples(tmp_path: Path) -> None:
    prompt = Prompt(prompt="a", columns={"answer": "é 1", "columns": "x"})
    sample = ValidationSample(
        iteration=0, num_rollouts=0, prompt=prompt, prompt_ids=[1], response_ids=[2], response="b", truncated=False,
        score=0.5, kl=0.0,
    )  # fmt: skip
    save_records(tmp_path, "train", [prompt])
    save_records(tmp_path, "validation", [sample])
    assert load_records(tmp_path, "train", Prompt) == [prompt]
    assert load_records(tmp_path, "validation", ValidationSample) == [sample]


@pytest.mark.parametrize("value", ["3", [1], {"answer": 3}, {"answer": None}, None])
def test_columns_that_are_not_text_are_refused(value: Any, tmp_path: Path) -> None:
    row = {"prompt": "a", "id": "1", "conversation": None, "columns": value}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"train.jsonl:1 is not a valid Prompt"):
        load_records(tmp_path, "train", Prompt)


def test_prompts_with_columns_can_be_keys() -> None:
    assert len({Prompt(prompt="a", columns={"answer": "1"}), Prompt(prompt="a", columns={"answer": "1"})}) == 1


# --- settings ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"demonstrations": {"path": "d.jsonl", "keep": ["a"]}}, "demonstrations.keep is set, but only prompts keep"),
        ({"preferences": [{"path": "d.jsonl", "keep": ["a"]}]}, "preferences.0.keep is set, but only prompts keep"),
        ({"prompts": {"path": "d.jsonl", "keep": ["a", "a"]}}, "keep names a twice"),
        ({"prompts": {"path": "m", "format": "movie_ratings", "keep": ["a"]}}, "which movie_ratings does not have"),
        ({"prompts": {"path": "d.jsonl", "keep": [""]}}, "at least 1 character"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"prompts": {"path": "p.jsonl"}} | content)


def test_a_column_is_kept_if_every_source_keeps_it() -> None:
    one, both = {"path": "a", "keep": ["answer"]}, {"path": "b", "keep": ["answer", "unit"]}
    data = DataConfig.model_validate({"prompts": [one, both]})
    assert data.keeps("answer") and not data.keeps("unit")
