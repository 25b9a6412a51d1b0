"""Rendering of examples: what training encodes is what the chat template writes, with answers and their ends to learn."""

import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from components.rlhf.data.chat import DEFAULT_DATE, render_chat
from components.rlhf.data.examples import Example, Unusable
from components.rlhf.data.fields import Fields
from components.rlhf.data.records import Demonstration, Message
from components.rlhf.data.render import Renderer
from components.rlhf.data.shapes import CONVERTERS
from components.rlhf.data.tokenizer import encode_text, encode_turns
from tests.support.chat_tokenizers import FAMILIES, TURN_ENDS, make_tokenizer
from tests.support.tiny_model import make_tiny_tokenizer

REWRITING = ("deepseek r1", "qwen 3")  # templates that write an earlier answer differently from the last one
TURNS = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "Yes, I am."},
]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def renderer(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Renderer:
    return Renderer(tokenizer=tokenizer, **({"is_chat": True, "date": DEFAULT_DATE} | changes))


def example(section: str, row: dict[str, Any]) -> Example:
    (only,) = CONVERTERS[section](Fields(row))
    assert isinstance(only, Example)
    return only


def demonstrations(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **changes: Any) -> list[Demonstration]:
    return list(renderer(tokenizer, **changes).demonstrations(example("demonstrations", row)))


def learned(tokenizer: PreTrainedTokenizerFast, demonstration: Demonstration) -> list[str]:
    """The text of each run of tokens that carries loss."""
    encoded = encode_turns(
        tokenizer, demonstration.turns, max_tokens=10**6, is_chat=demonstration.conversation is not None
    )
    runs: list[list[int]] = [[]]
    for token, is_learned in zip(encoded.response_ids, encoded.response_mask, strict=True):
        if is_learned:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs]


def all_text(tokenizer: PreTrainedTokenizerFast, demonstration: Demonstration) -> str:
    encoded = encode_turns(
        tokenizer, demonstration.turns, max_tokens=10**6, is_chat=demonstration.conversation is not None
    )
    return str(tokenizer.decode([*encoded.prompt_ids, *encoded.response_ids]))


def test_every_family_is_here() -> None:
    assert set(TURN_ENDS) == set(FAMILIES) - {"no template"}


# --- the answers of a conversation ---


@pytest.mark.parametrize("family", [family for family in TURN_ENDS if family not in REWRITING])
def test_ids_of_a_conversation_are_those_of_its_rendered_text(family: str) -> None:
    """One record, whose ids are those of the whole rendered text, and every answer is learned with its end."""
    tokenizer = make_tokenizer(family)
    (only,) = demonstrations(tokenizer, {"messages": TURNS})
    messages = [Message(**turn) for turn in TURNS]
    text = render_chat(tokenizer, messages, add_generation_prompt=False)
    text = text[: text.rindex(TURN_ENDS[family]) + len(TURN_ENDS[family])]
    encoded = encode_turns(tokenizer, only.turns, max_tokens=10**6, is_chat=True)
    assert [*encoded.prompt_ids, *encoded.response_ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [run.strip() for run in learned(tokenizer, only)] == [
        f"It is 4.{' ' if family == 'llama 2' else ''}{TURN_ENDS[family]}",
        f"Yes, I am.{' ' if family == 'llama 2' else ''}{TURN_ENDS[family]}",
    ]
    assert only.prompt == render_chat(tokenizer, messages[:1])  # what a rollout continues


@pytest.mark.parametrize("family", REWRITING)
def test_conversation_that_the_template_rewrites_is_one_record_per_answer(family: str) -> None:
    """Each record is what the model sees when it gives that answer."""
    tokenizer = make_tokenizer(family)
    first, last = demonstrations(tokenizer, {"messages": TURNS})
    messages = [Message(**turn) for turn in TURNS]
    assert first.prompt == render_chat(tokenizer, messages[:1])
    assert last.prompt == render_chat(tokenizer, messages[:3])
    thought = "<think>\n\n</think>\n\n" if family == "qwen 3" else ""
    assert learned(tokenizer, first) == [f"{thought}It is 4.{TURN_ENDS[family]}"]
    assert learned(tokenizer, last) == [f"{thought}Yes, I am.{TURN_ENDS[family]}"]


@pytest.mark.parametrize("family", TURN_ENDS)
def test_only_the_last_answer_is_learned_if_so_set(family: str) -> None:
    tokenizer = make_tokenizer(family)
    (only,) = demonstrations(tokenizer, {"messages": TURNS}, assistant_turns="last")
    (text,) = learned(tokenizer, only)
    assert "Yes, I am." in text and "It is 4." not in text
    assert "It is 4." in only.prompt


@pytest.mark.parametrize("family", TURN_ENDS)
def test_answers_that_the_source_excludes_are_not_learned(family: str) -> None:
    tokenizer = make_tokenizer(family)
    turns = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    texts = [
        text
        for demonstration in demonstrations(tokenizer, {"messages": turns})
        for text in learned(tokenizer, demonstration)
    ]
    assert len(texts) == 1 and "Yes, I am." in texts[0]
    with pytest.raises(Unusable, match="excludes every answer"):
        demonstrations(tokenizer, {"messages": turns[:2]})


def test_thoughts_of_every_answer_are_learned_where_the_model_gives_them() -> None:
    tokenizer = make_tokenizer("qwen 3")
    turns = [TURNS[0], {"role": "assistant", "content": "<think>Add.</think>It is 4."}, *TURNS[2:]]
    first, last = demonstrations(tokenizer, {"messages": turns})
    assert learned(tokenizer, first) == ["<think>\nAdd.\n</think>\n\nIt is 4.<|im_end|>"]
    assert "Add." not in last.prompt


def test_marks_of_the_template_win_over_prefixes() -> None:
    """A template that marks only a part of each answer."""
    tokenizer = make_tokenizer("chatml with marks")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% generation %}{{ m['content'] }}", "Answer: {% generation %}{{ m['content'] }}"
    )
    (only,) = demonstrations(tokenizer, {"messages": TURNS})
    assert learned(tokenizer, only) == ["It is 4.<|im_end|>", "Yes, I am.<|im_end|>"]
    assert "Answer: It is 4." in all_text(tokenizer, only)


def test_template_without_a_token_of_its_own_is_one_record_per_answer() -> None:
    """Between answers such a template writes no end, which every answer needs to be learned with."""
    tokenizer = make_tiny_tokenizer()
    first, last = demonstrations(tokenizer, {"messages": TURNS})
    assert learned(tokenizer, first) == ["It is 4.<eos>"]
    assert last.prompt == "<user>What is 2+2?\n<assistant>It is 4.\n<user>Are you sure?\n<assistant>"


# --- pairs, ratings and prompts ---


@pytest.mark.parametrize("family", TURN_ENDS)
def test_all_sections_render_the_same_question_alike(family: str) -> None:
    tokenizer = make_tokenizer(family)
    text = "What is 2+2?"
    turns = [{"role": "user", "content": text}]
    render = renderer(tokenizer)
    prompts = {
        render.prompt(example("prompts", {"prompt": text})).prompt,
        render.prompt(example("prompts", {"messages": turns})).prompt,
        render.pair(example("preferences", {"prompt": text, "chosen": "4", "rejected": "5"})).prompt,
        render.rated(example("preferences", {"prompt": text, "completion": "4", "rating": 1})).prompt,
        next(iter(render.demonstrations(example("demonstrations", {"prompt": text, "completion": "4"})))).prompt,
        render.pair(
            example(
                "preferences",
                {"chosen": f"\n\nHuman: {text}\n\nAssistant: 4", "rejected": f"\n\nHuman: {text}\n\nAssistant: 5"},
            )
        ).prompt,
    }
    assert prompts == {render_chat(tokenizer, [Message(role="user", content=text)])}


@pytest.mark.parametrize("family", TURN_ENDS)
def test_answer_of_a_pair_is_what_sft_learns(family: str) -> None:
    tokenizer = make_tokenizer(family)
    pair = renderer(tokenizer).pair(example("preferences", {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}))
    (demonstration,) = demonstrations(tokenizer, {"prompt": "Hi", "completion": "Hello."})
    assert (demonstration.turns[0].context, demonstration.turns[0].answer) == (pair.prompt, pair.chosen)
    encoded = encode_text(tokenizer, pair.prompt, pair.chosen, max_tokens=100, is_chat=True)
    assert tokenizer.decode(encoded.response_ids) == learned(tokenizer, demonstration)[0]


def test_answers_of_several_turns_are_whole() -> None:
    tokenizer = make_tokenizer("qwen")
    other = [*TURNS[:3], {"role": "assistant", "content": "No."}]
    row = {"prompt": "What is 2+2?", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "5"}]}
    pair = renderer(tokenizer).pair(example("preferences", row))
    assert (
        pair.chosen
        == "It is 4.<|im_end|>\n<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\nYes, I am."
    )
    assert pair.rejected == "5"
    late = renderer(tokenizer).pair(example("preferences", {"chosen": TURNS, "rejected": other}))
    assert (late.chosen, late.rejected) == ("Yes, I am.", "No.")
    assert late.prompt.count("<|im_start|>user") == 2


def test_thinking_that_the_prompt_opens_is_opened_once() -> None:
    tokenizer = make_tokenizer("deepseek r1")
    answer = "<think>\nWell.</think>Yes"
    pair = renderer(tokenizer).pair(example("preferences", {"prompt": "Hi", "chosen": answer, "rejected": "No"}))
    assert (pair.prompt + pair.chosen).count("<think>") == 1
    assert pair.rejected == "No"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Reply with one of [yes] [no]", "[no] because"), ("Continue the tag <b>", "<b>bold</b>")],
)
@pytest.mark.parametrize("family", [*TURN_ENDS, "bare"])
def test_answer_that_repeats_the_users_words_is_kept(family: str, prompt: str, completion: str) -> None:
    tokenizer = make_tokenizer("qwen" if family == "bare" else family)
    if family == "bare":
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    (only,) = demonstrations(tokenizer, {"prompt": prompt, "completion": completion})
    assert only.turns[0].answer.strip().removeprefix("<think>\n\n</think>\n\n") == completion


def test_date_is_that_of_the_settings() -> None:
    render = renderer(make_tokenizer("llama 3"), date=datetime.date(2024, 7, 26))
    assert "Today Date: 26 Jul 2024" in render.prompt(example("prompts", {"prompt": "Hi"})).prompt


# --- plain text ---


def test_plain_texts_are_used_as_they_are() -> None:
    tokenizer = make_tokenizer("qwen")
    render = renderer(tokenizer, is_chat=False)
    transcript = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": f"{transcript} Hello.", "rejected": f"{transcript} No.\n\nHuman: Why?\n\nAssistant: So."}
    pair = render.pair(example("preferences", row))
    assert (pair.prompt, pair.chosen) == (transcript, " Hello.")
    assert pair.rejected == " No.\n\nHuman: Why?\n\nAssistant: So." and pair.conversation is None
    code = render.pair(example("preferences", {"prompt": "f", "chosen": "    x", "rejected": "x"}))
    assert (code.chosen, code.rejected) == ("    x", "x")
    with pytest.raises(Unusable, match="messages need a chat template"):
        render.prompt(example("prompts", {"messages": TURNS}))


# --- what a template leaves out ---


def test_tool_calls_and_tools_are_rendered() -> None:
    tokenizer = make_tokenizer("chatml with tools")
    row = {
        "tools": [{"type": "function", "function": {"name": "add", "description": None}}],
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "4"},
            TURNS[3],
        ],
    }
    (only,) = demonstrations(tokenizer, row)
    call, answer = learned(tokenizer, only)
    assert call == '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>'
    assert answer == "Yes, I am.<|im_end|>"
    assert '{"type": "function", "function": {"name": "add"}}' in only.prompt  # Arrow's null is left out
    assert "<|im_start|>tool\n4<|im_end|>" in only.turns[1].context


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (
            None,
            {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
            "leaves out tool calls",
        ),
        (None, {"messages": TURNS, "tools": [{"name": "add"}]}, "leaves out tools"),
        (
            "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            {"messages": [{"role": "system", "content": "Be kind."}, *TURNS]},
            "leaves out messages of the system",
        ),
        ("{{ raise_exception('roles must alternate') }}", {"messages": TURNS}, "the chat template rejects it"),
    ],
)
def test_what_the_template_leaves_out_is_refused(template: str | None, row: dict[str, Any], reason: str) -> None:
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = template or tokenizer.chat_template
    with pytest.raises(Unusable) as caught:
        demonstrations(tokenizer, row)
    assert reason in caught.value.reason
