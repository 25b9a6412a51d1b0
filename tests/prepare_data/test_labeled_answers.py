"""data.desirable_rating: rated answers become labeled ones, for the loss kto."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from components.import_model.__main__ import main as import_model
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import LabeledText, PreferencePair
from components.rlhf.data.token_files import encode_all
from components.rlhf.data.tokenizer import encode_record, load_tokenizer
from tests.prepare_data.test_prepare_data import invoke, is_empty, write_jsonl, write_sources


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base") / "model"
    settings = ImportModelStageConfig(kind="base_model", source=str(tiny_model)).canonical_json()
    paths = ["--model", str(target), "--tokenizer", str(target.with_name("tokenizer"))]
    assert CliRunner().invoke(import_model, [*paths, "--settings", settings]).exit_code == 0
    return target.with_name("tokenizer")


def rows(*, answers: int, label: bool) -> Iterator[dict[str, Any]]:
    """One or more answers to each prompt: with good/bad labels, or with ratings of 1 to 5."""
    for number in range(120):
        for answer in range(answers):
            rated = {"label": (number + answer) % 2 == 0} if label else {"rating": 1 + (number + 2 * answer) % 5}
            yield {"prompt": f"What is {number} plus one?", "completion": f" It is {number + answer}."} | rated


def data_of(folder: Path, *, answers: int = 1, label: bool = True, **changes: Any) -> dict[str, Any]:
    data = write_sources(folder)
    write_jsonl(folder / "rated.jsonl", rows(answers=answers, label=label))
    data |= {"preferences": {"path": str(folder / "rated.jsonl")}, "desirable_rating": 0.5}
    return data | {"weights": data["weights"] | {"judge": 0}} | changes


def test_labels_need_no_second_answer(base: Path, tmp_path: Path) -> None:
    """As in a data set of thumbs up and down; without a judge that is trained on pairs there are none."""
    result = invoke(base, tmp_path / "out", data_of(tmp_path))
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "out" / "preferences"
    labeled = load_records(folder, "labeled", LabeledText)
    wanted = {(row["prompt"], row["completion"]): row["label"] for row in rows(answers=1, label=True)}
    assert len(labeled) > 20
    assert all(text.is_desirable is wanted[text.prompt, text.completion] for text in labeled)
    assert {text.is_desirable for text in labeled} == {True, False}
    assert [load_records(folder, split, PreferencePair) for split in ("train", "heldout")] == [[], []]
    assert f"preferences: 0 train, 0 heldout, {len(labeled)} labeled" in result.stderr


def test_ratings_give_labels_beside_pairs_and_both_are_of_the_same_prompts(base: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path, answers=2, label=False, desirable_rating=4)
    data["weights"]["judge"] = 1
    result = invoke(base, tmp_path / "out", data)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "out" / "preferences"
    labeled, pairs = load_records(folder, "labeled", LabeledText), load_records(folder, "train", PreferencePair)
    ratings = {(row["prompt"], row["completion"]): row["rating"] for row in rows(answers=2, label=False)}
    assert all(text.is_desirable is (ratings[text.prompt, text.completion] >= 4) for text in labeled)
    assert pairs and {pair.prompt for pair in pairs} <= {text.prompt for text in labeled}
    heldout = load_records(folder, "heldout", PreferencePair)
    assert heldout and not {pair.prompt for pair in heldout} & {text.prompt for text in labeled}


def test_ids_of_labeled_answers_are_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke(base, tmp_path / "out", data_of(tmp_path)).exit_code == 0
    folder, tokenizer = tmp_path / "out" / "preferences", load_tokenizer(base)
    labeled = load_records(folder, "labeled", LabeledText)
    wanted = [text for record in labeled for text in encode_record(record, tokenizer, max_tokens=100)]
    monkeypatch.setattr("components.rlhf.data.token_files.pack", None)  # nothing is encoded
    log: list[str] = []
    found = encode_all(labeled, tokenizer, max_tokens=100, folder=folder, split="labeled", log=log.append)
    assert list(found) == wanted and log == []


def test_without_the_setting_nothing_is_labeled(base: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path, answers=2, desirable_rating=None)
    assert invoke(base, tmp_path / "out", data).exit_code == 0
    assert {path.name for path in (tmp_path / "out" / "preferences").glob("*.jsonl")} == {
        "train.jsonl",
        "heldout.jsonl",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"desirable_rating": 0}, "labels all {n} answers as desirable: their ratings are from 0 to 1; set it between them."),
        ({"desirable_rating": 7}, "labels all {n} answers as undesirable: their ratings are from 0 to 1"),
        ({"weights": {"judge": 1}}, "No preference pairs are held out to measure accuracy on"),
    ],
)  # fmt: skip
def test_unusable_labels_print_one_line_and_write_nothing(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    result = invoke(base, tmp_path / "out", data_of(tmp_path, **changes))
    assert result.exit_code == 1 and is_empty(tmp_path / "out")
    error = result.stderr.splitlines()[-1]
    assert message.partition("{n}")[0] in error and message.rpartition("{n}")[2] in error


def test_pairs_alone_cannot_be_labeled(base: Path, tmp_path: Path) -> None:
    result = invoke(base, tmp_path / "out", write_sources(tmp_path) | {"desirable_rating": 0.5})
    assert result.exit_code == 1 and is_empty(tmp_path / "out")
    assert "no answer of data.preferences is left with a rating or a label" in result.stderr
