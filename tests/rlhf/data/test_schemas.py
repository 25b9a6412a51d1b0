from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from components.rlhf.data.records import Demonstration, PreferencePair, Prompt
from components.rlhf.data.schemas import to_demonstration, to_pair, to_prompt
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_tokenizer

PLACE = "data.jsonl:3"
TOKENIZER = make_tiny_tokenizer()
USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def refusal(read: Any, row: dict[str, Any], template: str = "plain", tokenizer: object = TOKENIZER) -> str:
    with pytest.raises(InputError) as caught:
        read(PLACE, row, tokenizer, template)
    message = str(caught.value)
    assert message.startswith(PLACE)
    return message


# --- the four forms ---


def test_a_prompt() -> None:
    assert to_prompt(PLACE, {"prompt": " Hi ", "other": 1}, TOKENIZER, "plain") == Prompt(prompt=" Hi ")


def test_a_prompt_with_a_completion() -> None:
    row = {"prompt": "Hi", "completion": " there"}
    assert to_demonstration(PLACE, row, TOKENIZER, "plain") == Demonstration(prompt="Hi", completion=" there")


def test_messages_as_a_demonstration() -> None:
    got = to_demonstration(PLACE, {"messages": [SYSTEM, USER, ASSISTANT]}, TOKENIZER, "plain")
    assert got == Demonstration(prompt="<system>Be kind.\n<user>Hi\n<assistant>", completion="Hello.")


def test_messages_as_a_prompt() -> None:
    """The answer that a demonstration ends with is no part of the question."""
    expected = Prompt(prompt="<user>Hi\n<assistant>")
    assert to_prompt(PLACE, {"messages": [USER]}, TOKENIZER, "plain") == expected
    assert to_prompt(PLACE, {"messages": [USER, ASSISTANT]}, TOKENIZER, "plain") == expected
    longer = to_prompt(PLACE, {"messages": [USER, ASSISTANT, USER]}, TOKENIZER, "plain")
    assert longer.prompt == "<user>Hi\n<assistant>Hello.\n<user>Hi\n<assistant>"


@pytest.mark.parametrize(("margin", "expected"), [(None, None), (0.5, 0.5), (2, 2.0), (-1, -1.0)])
def test_a_pair(margin: float | None, expected: float | None) -> None:
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad", "margin": margin}
    got = to_pair(PLACE, row, TOKENIZER, "plain")
    assert got == PreferencePair(prompt="Hi", chosen="good", rejected="bad", margin=expected)


def test_a_pair_needs_no_margin() -> None:
    assert to_pair(PLACE, {"prompt": "Hi", "chosen": "a", "rejected": "b"}, TOKENIZER, "plain").margin is None


def test_a_null_is_an_empty_text_and_left_to_cleaning() -> None:
    assert to_demonstration(PLACE, {"prompt": "Hi", "completion": None}, TOKENIZER, "plain").completion == ""


# --- the chat template ---


def test_template_chat_makes_a_user_message_of_each_prompt() -> None:
    rendered = "<user>Hi\n<assistant>"
    assert to_prompt(PLACE, {"prompt": "Hi"}, TOKENIZER, "chat").prompt == rendered
    assert to_demonstration(PLACE, {"prompt": "Hi", "completion": "x"}, TOKENIZER, "chat").prompt == rendered
    assert to_pair(PLACE, {"prompt": "Hi", "chosen": "a", "rejected": "b"}, TOKENIZER, "chat").prompt == rendered
    assert to_prompt(PLACE, {"messages": [USER]}, TOKENIZER, "chat").prompt == rendered  # not rendered twice


def test_an_empty_prompt_stays_empty_in_a_template() -> None:
    """Rendered, it would look like a prompt, and cleaning could not drop it."""
    assert to_prompt(PLACE, {"prompt": "  "}, TOKENIZER, "chat").prompt == "  "


def test_a_tokenizer_without_a_template() -> None:
    bare = make_tiny_tokenizer()
    bare.chat_template = None
    for row, template in (({"prompt": "Hi"}, "chat"), ({"messages": [USER]}, "plain")):
        assert refusal(to_prompt, row, template, bare) == (
            f"{PLACE}: this needs a chat template, and the base model's tokenizer has none; use plain prompts."
        )
    assert to_prompt(PLACE, {"prompt": "Hi"}, bare, "plain").prompt == "Hi"


def test_a_template_that_refuses() -> None:
    picky: PreTrainedTokenizerFast = make_tiny_tokenizer()
    picky.chat_template = "{{ raise_exception('roles must alternate') }}"
    said = refusal(to_prompt, {"messages": [USER, USER]}, "plain", picky)
    assert said == f"{PLACE}: the model's chat template refuses these messages (roles must alternate)."


# --- what is refused ---


@pytest.mark.parametrize(
    ("read", "row", "missing", "there"),
    [
        (to_prompt, {"text": "Hi", "n": 1}, "prompt", "text, n"),
        (to_prompt, {}, "prompt", "none"),
        (to_demonstration, {"prompt": "Hi"}, "completion", "prompt"),
        (to_pair, {"prompt": "Hi", "chosen": "a"}, "rejected", "prompt, chosen"),
        (to_pair, {"messages": [USER]}, "prompt", "messages"),
    ],
)
def test_a_missing_field_names_those_that_there_are(read: Any, row: dict[str, Any], missing: str, there: str) -> None:
    assert refusal(read, row) == (
        f"{PLACE} has no field {missing!r} (fields there: {there}); name it in columns or correct the data."
    )


@pytest.mark.parametrize(
    ("read", "name", "value", "kind"),
    [
        (to_prompt, "prompt", 3, "int"),
        (to_prompt, "prompt", ["Hi"], "list"),
        (to_demonstration, "completion", {"a": 1}, "dict"),
        (to_pair, "chosen", True, "bool"),
        (to_pair, "rejected", b"raw", "bytes"),
    ],
)
def test_a_wrong_type_names_the_field(read: Any, name: str, value: object, kind: str) -> None:
    row = {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"} | {name: value}
    assert refusal(read, row) == f"{PLACE}: {name} is a {kind}; it must be text."


@pytest.mark.parametrize("margin", ["0.5", True, float("nan"), float("inf"), [1]])
def test_a_margin_that_is_no_finite_number(margin: object) -> None:
    said = refusal(to_pair, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin})
    assert said == f"{PLACE}: margin is {margin!r}; it must be a finite number."


@pytest.mark.parametrize("messages", [[], None, "Hi", {"role": "user"}])
def test_messages_that_are_no_list(messages: object) -> None:
    for read in (to_prompt, to_demonstration):
        assert "messages must be a list of {role, content} objects" in refusal(read, {"messages": messages})


@pytest.mark.parametrize(
    "message", ["Hi", {"role": "user"}, {"content": "Hi"}, {"role": "user", "content": None}, None]
)
def test_a_message_that_is_none(message: object) -> None:
    for read in (to_prompt, to_demonstration):
        said = refusal(read, {"messages": [USER, message]})
        assert said == f"{PLACE}: message 2 must be an object with the texts role and content."


@pytest.mark.parametrize("messages", [[USER], [ASSISTANT], [USER, ASSISTANT, USER]])
def test_a_demonstration_ends_with_an_answer(messages: list[dict[str, str]]) -> None:
    said = refusal(to_demonstration, {"messages": messages})
    assert said == f"{PLACE}: messages must end with one of role 'assistant' after at least one other."


def test_messages_without_a_question() -> None:
    said = refusal(to_prompt, {"messages": [ASSISTANT]})
    assert said == f"{PLACE}: messages hold no question; a message of role 'user' is needed."
