"""Columns that stay with prompts, through deduplication and split; data without preferences; what the preview shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.prepare_data.examples import show
from components.prepare_data.prepare import PreparedData, prepare
from components.prepare_data.report import as_markdown, log_lines, shown_examples
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.data.records import Prompt
from components.rlhf.text.errors import InputError
from tests.support.chat_tokenizers import make_tokenizer

TOKENIZER = make_tokenizer("qwen")
NUM = 80


def rows() -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}:", "completion": f" {n}", "answer": n} for n in range(NUM)]


def prepared(folder: Path, records: list[dict[str, Any]], **changes: Any) -> tuple[PreparedData, DataConfig]:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in records))
    content = {
        "demonstrations": {"path": str(file)},
        "prompts": {"path": str(file), "keep": ["answer"]},
        "weights": {"sft": 0.5, "prompts": 0.5, "reward_model": 0.0, "judge": 0.0},
        "held_out": 0.25,
        "num_validation_prompts": 6,
        "near_duplicates": 1.0,
    }
    data = DataConfig.model_validate(content | changes)
    return prepare(data, TOKENIZER, seed=0, num_evaluation_prompts=4), data


def test_every_prompt_of_every_split_has_its_own_answer(tmp_path: Path) -> None:
    out, _ = prepared(tmp_path, rows())
    splits = [out.prompts, out.validation_prompts, out.heldout_prompts]
    assert all(splits)
    for prompt in (prompt for split in splits for prompt in split):
        assert prompt.columns == {"answer": prompt.prompt.removeprefix("question ").removesuffix(":")}


def test_split_does_not_depend_on_the_columns(tmp_path: Path) -> None:
    with_columns, _ = prepared(tmp_path, rows())
    without, _ = prepared(tmp_path, rows(), prompts={"path": str(tmp_path / "data.jsonl")})
    for name in ("prompts", "validation_prompts", "heldout_prompts", "demonstrations"):
        ours, theirs = getattr(with_columns, name), getattr(without, name)
        assert [record.prompt for record in ours] == [record.prompt for record in theirs]
    assert all(not prompt.columns for prompt in without.prompts)


def test_same_prompt_with_the_same_answer_is_a_duplicate_and_with_another_one_a_defect(tmp_path: Path) -> None:
    again, other = {"prompt": "question 3:", "answer": 3}, {"prompt": "question 4:", "answer": 5}
    out, _ = prepared(tmp_path, [*rows(), dict(again, completion=" 3"), dict(other, completion=" 5")])
    tally = out.tallies["data.prompts"]
    assert dict(tally.dropped) == {"duplicate": 1, "the same prompt with another answer": 1}
    assert tally.defects == {"the same prompt with another answer"}
    location = f"{tmp_path / 'data.jsonl'}:{NUM + 2}"
    assert tally.first["the same prompt with another answer"] == (
        f"{location}: the prompt occurs before with answer '4', here with '5'."
    )


def test_contradictions_in_most_of_the_data_are_refused(tmp_path: Path) -> None:
    twice = [dict(row, answer=row["answer"] + shift) for row in rows() for shift in (0, 1)]
    with pytest.raises(InputError, match="the same prompt with another answer"):
        prepared(tmp_path, twice)


def test_run_without_preferences_has_empty_data_sets_of_pairs(tmp_path: Path) -> None:
    out, data = prepared(tmp_path, rows())
    sizes = {name: {s: len(r) for s, r in splits.items()} for name, (_, splits) in out.data_sets().items()}
    assert sizes["preferences"] == {"train": 0, "heldout": 0}
    assert sizes["judge_preferences"] == {"train": 0, "ratings": 0, "heldout": 0}
    assert "data.preferences" not in as_markdown(out, data, shown_examples(out, data, TOKENIZER, seed=0))
    assert log_lines(out, data)


@pytest.mark.parametrize(("role", "others"), [("reward_model", "judge"), ("judge", "reward_model")])
def test_role_with_weight_0_needs_no_pairs(role: str, others: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"p {n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(60))
    )
    weights = {"sft": 0.5, "prompts": 0.5, role: 0.0, others: 0.5}
    out, _ = prepared(tmp_path, rows(), preferences={"path": str(pairs)}, weights=weights)
    by_role = {"reward_model": out.pairs, "judge": out.judge_pairs}
    assert by_role[role] == [] and by_role[others] and out.heldout_pairs


def test_preview_shows_the_answer_of_a_prompt() -> None:
    prompt = Prompt(prompt="p", columns={"answer": "4\n2", "long": "x" * 200})
    title = show("prompt 1", prompt, TOKENIZER, max_tokens=100).title
    assert title == f"prompt 1, answer: 4 2, long: {'x' * 80}"
