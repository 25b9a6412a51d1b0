from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from components.rlhf.data.records import Demonstration, Message, PreferencePair, Prompt
from components.rlhf.data.schemas import to_demonstration, to_pair, to_prompt
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_tokenizer

LOCATION = "data.jsonl:3"
TOKENIZER = make_tiny_tokenizer()
USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def error_message(read: Any, row: dict[str, Any], template: str = "plain", tokenizer: object = TOKENIZER) -> str:
    with pytest.raises(InputError) as caught:
        read(LOCATION, row, tokenizer, template)
    message = str(caught.value)
    assert message.startswith(LOCATION)
    return message


# --- the four row formats ---


def test_prompt() -> None:
    assert to_prompt(LOCATION, {"prompt": " Hi ", "other": 1}, TOKENIZER, "plain") == Prompt(prompt=" Hi ")


def test_prompt_with_completion() -> None:
    row = {"prompt": "Hi", "completion": " there"}
    assert to_demonstration(LOCATION, row, TOKENIZER, "plain") == Demonstration(prompt="Hi", completion=" there")


def test_messages_as_a_demonstration() -> None:
    got = to_demonstration(LOCATION, {"messages": [SYSTEM, USER, ASSISTANT]}, TOKENIZER, "plain")
    assert got == Demonstration(
        prompt="<system>Be kind.\n<user>Hi\n<assistant>",
        completion="Hello.",
        messages=(Message(**SYSTEM), Message(**USER)),
    )


def test_messages_as_a_prompt() -> None:
    """The final answer of a demonstration is not part of the prompt."""
    expected = Prompt(prompt="<user>Hi\n<assistant>", messages=(Message(**USER),))
    assert to_prompt(LOCATION, {"messages": [USER]}, TOKENIZER, "plain") == expected
    assert to_prompt(LOCATION, {"messages": [USER, ASSISTANT]}, TOKENIZER, "plain") == expected
    longer = to_prompt(LOCATION, {"messages": [USER, ASSISTANT, USER]}, TOKENIZER, "plain")
    assert longer.prompt == "<user>Hi\n<assistant>Hello.\n<user>Hi\n<assistant>"


@pytest.mark.parametrize(("margin", "expected"), [(None, None), (0.5, 0.5), (2, 2.0), (-1, -1.0)])
def test_pair(margin: float | None, expected: float | None) -> None:
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad", "margin": margin}
    got = to_pair(LOCATION, row, TOKENIZER, "plain")
    assert got == PreferencePair(prompt="Hi", chosen="good", rejected="bad", margin=expected)


def test_margin_is_optional() -> None:
    assert to_pair(LOCATION, {"prompt": "Hi", "chosen": "a", "rejected": "b"}, TOKENIZER, "plain").margin is None


def test_null_becomes_an_empty_text() -> None:
    assert to_demonstration(LOCATION, {"prompt": "Hi", "completion": None}, TOKENIZER, "plain").completion == ""


# --- the chat template ---


def test_chat_template_renders_prompts_as_user_messages() -> None:
    rendered = "<user>Hi\n<assistant>"
    assert to_prompt(LOCATION, {"prompt": "Hi"}, TOKENIZER, "chat").prompt == rendered
    assert to_demonstration(LOCATION, {"prompt": "Hi", "completion": "x"}, TOKENIZER, "chat").prompt == rendered
    assert to_pair(LOCATION, {"prompt": "Hi", "chosen": "a", "rejected": "b"}, TOKENIZER, "chat").prompt == rendered
    assert to_prompt(LOCATION, {"messages": [USER]}, TOKENIZER, "chat").prompt == rendered  # not rendered twice


def test_empty_prompt_is_not_rendered() -> None:
    """Rendered, it would not be empty, and cleaning could not drop it."""
    assert to_prompt(LOCATION, {"prompt": "  "}, TOKENIZER, "chat").prompt == "  "


def test_missing_chat_template_is_rejected() -> None:
    without_template = make_tiny_tokenizer()
    without_template.chat_template = None
    for row, template in (({"prompt": "Hi"}, "chat"), ({"messages": [USER]}, "plain")):
        assert error_message(to_prompt, row, template, without_template) == (
            f"{LOCATION}: a chat template is required, but the base model's tokenizer has none; use plain prompts."
        )
    assert to_prompt(LOCATION, {"prompt": "Hi"}, without_template, "plain").prompt == "Hi"


def test_error_of_chat_template_is_reported() -> None:
    strict: PreTrainedTokenizerFast = make_tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = error_message(to_prompt, {"messages": [USER, USER]}, "plain", strict)
    assert message == f"{LOCATION}: the model's chat template rejects these messages (roles must alternate)."


# --- invalid rows ---


@pytest.mark.parametrize(
    ("read", "row", "missing", "fields"),
    [
        (to_prompt, {"text": "Hi", "n": 1}, "prompt", "text, n"),
        (to_prompt, {}, "prompt", "none"),
        (to_demonstration, {"prompt": "Hi"}, "completion", "prompt"),
        (to_pair, {"prompt": "Hi", "chosen": "a"}, "rejected", "prompt, chosen"),
        (to_pair, {"messages": [USER]}, "prompt", "messages"),
    ],
)
def test_missing_field_error_lists_the_found_fields(read: Any, row: dict[str, Any], missing: str, fields: str) -> None:
    assert error_message(read, row) == (
        f"{LOCATION} has no field {missing!r} (found: {fields}); map it in columns or correct the data."
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
def test_wrong_type_error_names_the_field(read: Any, name: str, value: object, kind: str) -> None:
    row = {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"} | {name: value}
    assert error_message(read, row) == f"{LOCATION}: {name} has type {kind}; it must be a string."


@pytest.mark.parametrize("margin", ["0.5", True, float("nan"), float("inf"), [1]])
def test_margin_must_be_a_finite_number(margin: object) -> None:
    message = error_message(to_pair, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin})
    assert message == f"{LOCATION}: margin is {margin!r}; it must be a finite number."


@pytest.mark.parametrize("messages", [[], None, "Hi", {"role": "user"}])
def test_messages_must_be_a_non_empty_list(messages: object) -> None:
    for read in (to_prompt, to_demonstration):
        assert "messages must be a non-empty list of {role, content} objects" in error_message(
            read, {"messages": messages}
        )


@pytest.mark.parametrize(
    "message", ["Hi", {"role": "user"}, {"content": "Hi"}, {"role": "user", "content": None}, None]
)
def test_message_must_have_role_and_content(message: object) -> None:
    for read in (to_prompt, to_demonstration):
        error = error_message(read, {"messages": [USER, message]})
        assert error == f"{LOCATION}: message 2 must be an object with the strings role and content."


@pytest.mark.parametrize("messages", [[USER], [ASSISTANT], [USER, ASSISTANT, USER]])
def test_demonstration_must_end_with_an_assistant_message(messages: list[dict[str, str]]) -> None:
    message = error_message(to_demonstration, {"messages": messages})
    assert message == f"{LOCATION}: messages must end with a message of role 'assistant' after at least one other."


def test_prompt_messages_need_a_user_message() -> None:
    message = error_message(to_prompt, {"messages": [ASSISTANT]})
    assert message == f"{LOCATION}: messages contain only an assistant message; add one of role 'user' before it."
