"""No question crosses the split, whatever mix of shapes holds it."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.prepare_data.prepare import PreparedData, prepare
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.text.errors import InputError
from tests.support.chat_tokenizers import make_tokenizer

WORDS = [
    "amber", "brook", "cider", "delta", "ember", "fjord", "grove", "haven", "islet", "jetty", "knoll", "larch", "maple", "noble",
    "ocean", "pearl", "quill", "river", "stone", "tulip", "umbra", "valve", "wheat", "yacht", "zebra",
]  # fmt: skip
TOKENIZER = make_tokenizer("chatml with tools")


def question(number: int) -> str:
    """Questions of which no two are alike."""
    return " ".join(random.Random(number).sample(WORDS, 6)).capitalize() + f" {number}?"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
LATER = [assistant("Well."), user("Could you say that again?")]
# Shapes of each section: functions of a question and of a number that makes answers differ.
SHAPES: dict[str, list[Any]] = {
    "demonstrations": [
        lambda q, n: {"prompt": q, "completion": f"Answer {n}."},
        lambda q, n: {"messages": [user(q), assistant(f"Answer {n}.")]},
        lambda q, n: {"messages": [SYSTEM, user(q), assistant(f"Answer {n}.")]},
        lambda q, n: {"messages": [user(q), *LATER, assistant(f"Answer {n}.")]},
        lambda q, n: {"conversations": [{"from": "human", "value": q.upper()}, {"from": "gpt", "value": f"Answer {n}."}]},
        lambda q, n: {"instruction": q, "input": "", "output": f"Answer {n}.", "system": "Be brief."},
        lambda q, n: {"instruction": "Again.", "output": f"Answer {n}.", "history": [[q, "Well."]]},
        lambda q, n: {"prompt": [user([{"type": "text", "text": q}])], "completion": [assistant(f"Answer {n}.")]},
    ],
    "preferences": [
        lambda q, n: {"prompt": f"  {q}", "chosen": f"Good {n}.", "rejected": "Bad."},
        lambda q, n: {"chosen": [user(q), assistant(f"Good {n}.")], "rejected": [user(q), assistant("Bad.")]},
        lambda q, n: {"prompt": [SYSTEM, user(q)], "chosen": [assistant(f"Good {n}.")], "rejected": [assistant("Bad.")]},
        lambda q, n: {
            "chosen": f"\n\nHuman: {q}\n\nAssistant: Good {n}.",
            "rejected": f"\n\nHuman: {q}\n\nAssistant: Bad.",
        },
        lambda q, n: {
            "chosen": f"\n\nHuman: {q}\n\nAssistant: So?\n\nHuman: Why?\n\nAssistant: Good {n}.",
            "rejected": f"\n\nHuman: {q}\n\nAssistant: So?\n\nHuman: Why?\n\nAssistant: Bad.",
        },
        lambda q, n: {"prompt": q.lower(), "answers": [f"Good {n}.", "Bad."], "ratings": [5, 1]},
        lambda q, n: {"prompt": q, "response_1": "Bad.", "response_2": f"Good {n}.", "preference_strength": 2},
    ],
    "prompts": [
        lambda q, n: {"prompt": q},
        lambda q, n: {"prompt": [SYSTEM, user(q)]},
        lambda q, n: {"messages": [user(q.replace(" ", "  "))]},
        lambda q, n: {"messages": [user(q), *LATER]},
        lambda q, n: {"prompt": q.rstrip("?")},
    ],
}  # fmt: skip


def first_question(record: Any) -> str:
    """The words of the first message of the user, found independently of the split's own key."""
    assert record.conversation is not None  # every mix holds messages
    text = next(m.content for m in record.conversation.messages if m.role == "user")
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def questions_by_role(out: PreparedData) -> dict[str, set[str]]:
    roles: dict[str, list[Any]] = {
        "sft": [*out.demonstrations],
        "reward model": [*out.pairs],
        "judge": [*out.judge_pairs, *out.judge_ratings],
        "ppo": [*out.prompts, *out.validation_prompts],
        "held out": [*out.heldout_demonstrations, *out.heldout_pairs, *out.heldout_prompts],
    }
    return {role: {first_question(record) for record in records} for role, records in roles.items()}


@st.composite
def mixes(draw: Any) -> dict[str, list[dict[str, Any]]]:
    """Rows of each section: most questions occur in every section, in any of its shapes and more than once."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    shapes = {
        section: draw(st.lists(st.sampled_from(all_shapes), min_size=1, unique=True))
        for section, all_shapes in SHAPES.items()
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for section, chosen in shapes.items():
        rows[section] = [
            generator.choice(chosen)(question(number), copy)
            for number in range(60)
            for copy in range(generator.choice((1, 1, 2)))
        ]
        generator.shuffle(rows[section])
    rows["prompts"].append({"messages": [user("Something else entirely, so that every mix is rendered as a chat.")]})
    return rows


def prepare_rows(
    folder: Path, rows: dict[str, list[dict[str, Any]]], *, tokenizer: Any = TOKENIZER, **changes: Any
) -> PreparedData:
    sources = {}
    for section, content in rows.items():
        path = folder / f"{section}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        sources[section] = {"path": str(path)}
    data = DataConfig.model_validate({**sources, "held_out": 0.25, "num_validation_prompts": 3, **changes})
    return prepare(data, tokenizer, seed=0, num_evaluation_prompts=1)


@given(mixes())
@settings(deadline=None, max_examples=40)
def test_no_question_crosses_the_split(rows: dict[str, list[dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = prepare_rows(Path(folder), rows)
    by_role = questions_by_role(out)
    assert sum(map(len, by_role.values())) == len(set().union(*by_role.values()))
    assert all(by_role.values())
    assert out.overlap is not None and out.overlap.total == 0


def test_near_duplicates_share_a_role_unless_turned_off(tmp_path: Path) -> None:
    """Sections whose questions differ by one word of a long text."""

    def long(number: int, word: str) -> str:
        generator = random.Random(number)
        return " ".join(generator.choice(WORDS) for _ in range(30)) + f" {word}?"

    rows = {
        "demonstrations": [{"messages": [user(long(n, "first")), assistant("Yes.")]} for n in range(80)],
        "preferences": [{"prompt": long(n, "second"), "chosen": "Yes.", "rejected": "No."} for n in range(80)],
        "prompts": [{"prompt": long(n, "third")} for n in range(80)],
    }

    def stems(out: PreparedData) -> dict[str, set[str]]:
        return {role: {q.rpartition(" ")[0] for q in questions} for role, questions in questions_by_role(out).items()}

    together = stems(prepare_rows(tmp_path, rows))
    assert sum(map(len, together.values())) == len(set().union(*together.values()))
    apart = stems(prepare_rows(tmp_path, rows, near_duplicates=1.0))
    assert sum(map(len, apart.values())) > len(set().union(*apart.values()))


def test_statement_of_the_report_is_computed(tmp_path: Path) -> None:
    """A leak that is put into the data sets after the split is found and shown."""
    from dataclasses import replace

    from components.prepare_data.report import split_statement
    from components.rlhf.data.near_duplicates import overlap

    rows = {
        "demonstrations": [{"messages": [user(question(n)), assistant("Yes.")]} for n in range(40)],
        "preferences": [{"prompt": question(n), "chosen": "Yes.", "rejected": "No."} for n in range(40)],
        "prompts": [{"prompt": question(n)} for n in range(40)],
    }
    out = prepare_rows(tmp_path, rows)
    data = DataConfig.model_validate({"preferences": {"path": "x"}, "prompts": {"path": "x"}})
    assert "no prompt of one role occurs" in split_statement(out, data)
    leaked = replace(out, prompts=[*out.prompts, out.heldout_prompts[0]])
    leaked.overlap = overlap(leaked.texts_by_role(of_snippets=False), threshold=0.8)
    statement = split_statement(leaked, data)
    assert "**2** prompts" in statement and first_question(out.heldout_prompts[0]) in statement


# --- one file for several sections ---


def test_one_file_of_pairs_is_preferences_and_prompts(tmp_path: Path) -> None:
    """Several pairs of a prompt, and ties, are no reason to refuse it; duplicates of prompts are counted."""
    pairs = [{"prompt": question(n), "chosen": f"Good {i}.", "rejected": "Bad."} for n in range(40) for i in range(4)]
    pairs += [{"prompt": question(n), "chosen": "Same.", "rejected": "Same."} for n in range(40)]
    rows = {
        "demonstrations": [{"prompt": question(n), "completion": "Yes."} for n in range(40)],
        "preferences": pairs,
        "prompts": pairs,
    }
    out = prepare_rows(tmp_path, rows)
    assert out.tallies["data.prompts"].dropped == {"duplicate": 160}
    assert out.tallies["data.preferences"].dropped == {"equal answers": 40}
    assert out.tallies["data.preferences"].kept == 160


def test_all_records_too_long_names_the_setting(tmp_path: Path) -> None:
    rows = {
        "demonstrations": [{"prompt": question(n), "completion": "Yes."} for n in range(40)],
        "preferences": [{"prompt": question(n), "chosen": "Yes.", "rejected": "No."} for n in range(40)],
        "prompts": [{"prompt": question(n) * 3} for n in range(40)],
    }
    with pytest.raises(InputError) as caught:
        prepare_rows(tmp_path, rows, max_prompt_tokens=60, max_tokens=90)
    assert "data.prompts" in str(caught.value) and "only 0 of 40 records are usable" in str(caught.value)
    assert "40 prompt longer than max_prompt_tokens (for example" in str(caught.value)
    assert "data.max_prompt_tokens is 60" in str(caught.value)


def test_pairs_that_differ_in_indentation_are_kept(tmp_path: Path) -> None:
    rows = {
        "demonstrations": [{"prompt": question(n), "completion": "Yes."} for n in range(40)],
        "preferences": [{"prompt": question(n), "chosen": "if x:\n    y", "rejected": "if x:\ny"} for n in range(40)],
        "prompts": [{"prompt": question(n)} for n in range(40)],
    }
    assert prepare_rows(tmp_path, rows).tallies["data.preferences"].kept == 40


# --- several sources ---


def mixed(tmp_path: Path, preferences: list[dict[str, Any]], sizes: list[int]) -> PreparedData:
    """Preferences from several files of given sizes."""
    for number, size in enumerate(sizes):
        path = tmp_path / f"p{number}.jsonl"
        content = [{"prompt": question(1000 * number + n), "chosen": "Yes.", "rejected": "No."} for n in range(size)]
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = [{"path": str(tmp_path / f"p{number}.jsonl"), **options} for number, options in enumerate(preferences)]
    rows = {
        "demonstrations": [{"prompt": question(5000 + n), "completion": "Yes."} for n in range(20)],
        "prompts": [{"prompt": question(6000 + n)} for n in range(40)],
    }
    return prepare_rows(tmp_path, rows, preferences=sources)


@pytest.mark.parametrize(
    ("options", "sizes", "kept"),
    [
        ([{}, {}], [60, 20], [60, 20]),
        ([{"limit": 30}, {}], [60, 20], [30, 20]),
        ([{"weight": 1}, {"weight": 1}], [60, 20], [20, 20]),
        ([{"weight": 3}, {"weight": 1}], [40, 20], [40, 13]),
        ([{"weight": 1, "limit": 10}, {"weight": 2}], [60, 40], [10, 20]),
    ],
)
def test_limits_and_weights(tmp_path: Path, options: list[dict[str, Any]], sizes: list[int], kept: list[int]) -> None:
    out = mixed(tmp_path, options, sizes)
    tallies = [out.tallies[f"data.preferences.{n}"] for n in range(2)]
    assert [tally.kept for tally in tallies] == kept
    assert [tally.dropped["beyond its limit or weight"] for tally in tallies] == [
        s - k for s, k in zip(sizes, kept, strict=True)
    ]
    assert [tally.read for tally in tallies] == sizes


def test_weights_of_only_some_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="only some sources of preferences have a weight"):
        DataConfig.model_validate(
            {"preferences": [{"path": "a", "weight": 1}, {"path": "b"}], "prompts": {"path": "c"}}
        )


def test_misspelled_field_in_columns_gets_the_closest_one() -> None:
    with pytest.raises(ValueError, match="'promt' is not a field; did you mean prompt\\?"):
        DataConfig.model_validate({"preferences": {"path": "a"}, "prompts": {"path": "c", "columns": {"promt": "q"}}})


def test_record_that_cannot_be_used_is_counted_and_does_not_end_the_source(tmp_path: Path) -> None:
    demonstrations = [{"messages": [user(question(n)), assistant("Yes.")]} for n in range(40)]
    demonstrations[7]["messages"].append(user("Thanks!"))
    rows = {
        "demonstrations": demonstrations,
        "preferences": [{"prompt": question(n), "chosen": "Yes.", "rejected": "No."} for n in range(40)],
        "prompts": [{"prompt": question(n)} for n in range(40)],
    }
    tally = prepare_rows(tmp_path, rows).tallies["data.demonstrations"]
    assert (tally.read, tally.kept, tally.dropped) == (40, 39, {"does not end with an answer": 1})
    assert tally.first["does not end with an answer"].startswith(f"{tmp_path / 'demonstrations.jsonl'}:8: ")


def test_duplicate_answer_of_a_split_conversation_does_not_drop_its_others(tmp_path: Path) -> None:
    """With a template that rewrites earlier turns, a conversation is one record per answer."""
    rows = {
        "demonstrations": [
            {"messages": [user(question(n)), assistant("Well."), user(f"And {i}?"), assistant("Yes.")]}
            for n in range(40)
            for i in range(2)
        ],
        "preferences": [{"prompt": question(n), "chosen": "Yes.", "rejected": "No."} for n in range(40)],
        "prompts": [{"prompt": question(n)} for n in range(40)],
    }
    tally = prepare_rows(tmp_path, rows, tokenizer=make_tokenizer("qwen 3")).tallies["data.demonstrations"]
    # Two conversations of a question have the same first answer, and different second ones.
    assert (tally.read, tally.kept, tally.dropped) == (160, 120, {"duplicate": 40})
