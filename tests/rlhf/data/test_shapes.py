"""Every row of the tables in docs/data.md is read as the table says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.data.examples import Answer, Example, Unusable
from components.rlhf.data.fields import Fields
from components.rlhf.data.records import Message
from components.rlhf.data.shapes import CONVERTERS

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def table(name: str) -> list[list[str]]:
    """The cells of the table between two markers."""
    text = DOCS.read_text(encoding="utf-8").split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    rows = text.strip().splitlines()[2:]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def row_in(cell: str) -> dict[str, Any]:
    row = json.loads(cell.strip("`"))
    assert isinstance(row, dict)
    return row


def convert(section: str, row: dict[str, Any]) -> list[Example]:
    examples = []
    for example in CONVERTERS[section](Fields(row)):
        if isinstance(example, Unusable):
            raise example
        examples.append(example)
    return examples


def show(examples: list[Example]) -> str:
    """Examples in the notation of the table."""

    def message(m: Message, role: str) -> str:
        calls = "".join(f"{call.name}({call.arguments})" for call in m.tool_calls)
        thoughts = f"({m.reasoning}) " if m.reasoning else ""
        return f"{role}: {thoughts}{m.content}{calls}".replace("\n", "\\n")

    def answer(a: Answer) -> str:
        rating = "" if a.rating is None else f", rating {a.rating:g}"
        return "; ".join(message(m, m.role) for m in a.messages) + rating

    def one(example: Example) -> str:
        prompt = "; ".join(message(m, "text" if example.is_text else m.role) for m in example.prompt.messages)
        answers = " > ".join(map(answer, example.answers))
        margin = "" if example.margin is None else f", margin {example.margin:g}"
        return " ".join(f"{prompt} -> {answers}{margin}".removesuffix(" -> ").split())

    return " | ".join(map(one, examples))


@pytest.mark.parametrize(("name", "section", "row", "expected"), table("shapes"), ids=lambda cell: cell[:40])
def test_shape_is_read_as_documented(name: str, section: str, row: str, expected: str) -> None:
    assert show(convert(section, row_in(row))) == expected, name


@pytest.mark.parametrize(("row", "section", "reason"), table("refused"), ids=lambda cell: cell[:40])
def test_shape_without_meaning_is_refused_as_documented(row: str, section: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        convert(section, row_in(row))
    assert caught.value.reason == reason


def test_at_least_20_shapes_are_documented() -> None:
    assert len(table("shapes")) >= 20 and len({row[0] for row in table("shapes")}) == len(table("shapes"))


# --- what looks like another shape and is not ---


def test_answers_that_begin_with_a_short_prompt_are_kept_whole() -> None:
    assert show(convert("preferences", {"prompt": "Yes", "chosen": "Yes, I do.", "rejected": "Yes."})) == (
        "text: Yes -> assistant: Yes, I do. > assistant: Yes."
    )


def test_demonstration_may_repeat_its_question() -> None:
    row = {"prompt": "What is two and two?", "completion": "What is two and two? Four."}
    assert show(convert("demonstrations", row)) == f"text: {row['prompt']} -> assistant: {row['completion']}"


def test_number_in_label_is_not_a_bad_demonstration() -> None:
    assert show(convert("demonstrations", {"prompt": "a", "completion": "b", "label": 0})) == "text: a -> assistant: b"


def test_fields_that_were_read_are_known() -> None:
    fields = Fields({"prompt": "a", "completion": "b", "label": None, "source": "x", "input": ""})
    list(CONVERTERS["demonstrations"](fields))
    assert set(fields.row) - fields.used == {"source"}
