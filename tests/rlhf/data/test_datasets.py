import json
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.data.datasets import DatasetHeader, load_records, read_header, save_dataset
from components.rlhf.data.records import (
    Conversation,
    Demonstration,
    Message,
    PreferencePair,
    Prompt,
    RatedText,
    ToolCall,
    Turn,
)
from components.rlhf.text.errors import InputError

CHAT = Conversation(
    messages=(
        Message(role="user", content="u"),
        Message(role="assistant", content="", tool_calls=(ToolCall(name="add", arguments="{}"),)),
    ),
    tools="[]",
)
RATED = '{"prompt": "p", "completion": "c", "conversation": null, "rating": %s}'
RECORDS: list[list[Any]] = [
    [
        Demonstration(turns=(Turn(context="p", answer=" c"), Turn(context="d", answer="e"))),
        Demonstration(turns=(Turn(context="ü\u2028\n\x85", answer="\U0001f600"),), conversation=CHAT),
    ],
    [
        PreferencePair(prompt="p", chosen="a", rejected="b"),
        PreferencePair(prompt="p", chosen="a", rejected="c", margin=0.1),
    ],
    [RatedText(prompt="p", completion="c", rating=-1.25)],
    [Prompt(prompt="p", id="train-0"), Prompt(prompt="p", conversation=CHAT)],
]


@pytest.mark.parametrize("records", RECORDS, ids=lambda records: type(records[0]).__name__)
def test_save_and_load_round_trip(tmp_path: Path, records: list[Any]) -> None:
    save_dataset(tmp_path, {"train": records, "heldout": []}, max_tokens=8, counts={"read": 3})
    assert load_records(tmp_path, "train", type(records[0])) == records
    assert load_records(tmp_path, "heldout", type(records[0])) == []
    assert read_header(tmp_path) == DatasetHeader(
        max_tokens=8, sizes={"train": len(records), "heldout": 0}, counts={"read": 3}
    )
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "heldout.jsonl", "dataset.json"}


def test_split_is_plain_jsonl(tmp_path: Path) -> None:
    save_dataset(tmp_path, {"train": [Prompt(prompt="ü", id="x")]}, max_tokens=8, counts={})
    text = (tmp_path / "train.jsonl").read_text(encoding="utf-8")
    assert text == '{"prompt": "ü", "id": "x", "conversation": null}\n'
    assert json.loads(text)["prompt"] == "ü"


@pytest.mark.parametrize(
    ("record", "line", "reason"),
    [
        (Demonstration, '{"conversation": null}', "'turns' is missing"),
        (Demonstration, '{"turns": [], "conversation": null, "id": "1"}', "'id' is not a field"),
        (PreferencePair, '{"prompt": "p", "chosen": "a", "rejected": "b", "conversation": null}', "'margin' is missing"),
        (Prompt, '{"prompt": "p", "conversation": null}', "'id' is missing"),
        (Prompt, '{"prompt": 1, "id": "1", "conversation": null}', "'prompt': Input should be a valid string"),
        (RatedText, RATED % "true", "'rating': Input should be a valid number"),
        (RatedText, RATED % '"1"', "'rating': Input should be a valid number"),
        (RatedText, RATED % f"1{'0' * 400}", f"the number 1{'0' * 39} is too large"),
    ],
)  # fmt: skip
def test_line_that_is_not_the_record_is_refused(tmp_path: Path, record: Any, line: str, reason: str) -> None:
    (tmp_path / "train.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_records(tmp_path, "train", record)
    location = f"{tmp_path / 'train.jsonl'}:1"
    assert str(caught.value) == f"{location} is not a valid {record.__name__} ({reason}); run prepare_data again."


def test_missing_split(tmp_path: Path) -> None:
    save_dataset(tmp_path, {"train": []}, max_tokens=8, counts={})
    with pytest.raises(InputError) as caught:
        load_records(tmp_path, "validation", Prompt)
    assert str(caught.value) == f"{tmp_path} has no split 'validation'; run prepare_data again."
