"""Settings of judges: one or several, each with the keys of its kind."""

from typing import Any

import pytest
from pydantic import ValidationError

from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.judge import KINDS, MAX_JUDGES_BYTES, JudgeStageConfig, LinearJudge, as_list
from components.rlhf.config.params import Params

DATA: dict[str, Any] = {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "preferences", "prompts")}
DATA["prompts"] |= {"keep": ["answer", "target", "solution"]}
ENDPOINT = {"kind": "endpoint", "url": "https://api.example.com/v1", "model": "gpt"}
FUNCTION = {"kind": "function", "function": "mine:score"}
MINIMAL: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "reward_model": {"kind": "reward_model"},
    "endpoint": ENDPOINT,
    "function": FUNCTION,
    "exact_match": {"kind": "exact_match"},
    "regex": {"kind": "regex", "pattern": "yes"},
    "numeric": {"kind": "numeric"},
    "json_schema": {"kind": "json_schema", "schema_text": {"type": "object"}},
    "command": {"kind": "command", "command": ["python", "check.py"]},
}
COMPLETE: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "name": "words", "features": "both", "max_ngram": 3, "max_character_ngram": 5, "regularisation": 2},
    "reward_model": {"kind": "reward_model", "name": "second", "use": "org/rm"},
    "endpoint": ENDPOINT
    | {
        "name": "gpt-4",
        "rubric": 'Prefer "kürzere" answers.\n\n\t- always\n',
        "api_key_variable": "MY_KEY",
        "num_pairs": 7,
        "max_tokens": 16,
        "extra_body": {"reasoning_effort": "low", "structured_outputs": {"choice": ["A", "B"]}, "seed": 1, "top_p": 0.5},
        "max_concurrency": 256,
        "requests_per_minute": 60,
        "timeout_seconds": 3,
        "max_retries": 0,
        "input_price": 0.15,
        "output_price": 1,
    },
    "function": FUNCTION
    | {"name": "length", "source": "def score(p, r):\n    return [0.0]\n", "timeout_seconds": 9, "memory_gib": 2},
    "exact_match": {"kind": "exact_match", "name": "exact", "column": "target", "after": "####", "ignore_case": True},
    "regex": {"kind": "regex", "name": "format", "pattern": r"(?s)<answer>(.*?)</answer>", "column": "answer"},
    "numeric": {"kind": "numeric", "name": "maths", "column": "solution"},
    "json_schema": {"kind": "json_schema", "name": "json", "schema_text": '{"type": "array"}'},
    "command": {
        "kind": "command",
        "name": "tests",
        "command": ["python", "check.py", "--strict"],
        "score": "printed",
        "timeout_seconds": 3,
        "max_concurrency": 4,
    },
}  # fmt: skip


def params_with(judge: Any) -> Params:
    return Params.model_validate({"data": DATA, "judge": judge})


def error_message(judge: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        params_with(judge)
    return explain_validation_error(caught.value, Params)


# --- what is accepted ---


def test_default_is_one_linear_judge() -> None:
    params = Params.model_validate({"data": DATA})
    assert params.judge == LinearJudge() and as_list(params.judge) == (LinearJudge(),)
    assert params_with({}).judge == params_with({"max_ngram": 2}).judge == LinearJudge()  # kind may be left out


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_and_in_a_list(kind: str) -> None:
    alone, in_list = params_with(MINIMAL[kind]).judge, params_with([MINIMAL[kind]]).judge
    assert type(alone) is KINDS[kind] and in_list == (alone,)
    assert as_list(alone) == as_list(in_list) == (alone,)
    assert alone.title == kind
    assert params_with(COMPLETE[kind]).judge.title == COMPLETE[kind]["name"]


def test_complete_settings_name_every_key() -> None:
    for kind, section in KINDS.items():
        # Exclude rubric and schema_text.
        optional = {"endpoint": {"rubric_file"}, "json_schema": {"schema_file", "column"}}.get(kind, set())
        assert set(COMPLETE[kind]) == set(section.model_fields) - optional


def test_judges_keep_their_order_because_the_first_decides() -> None:
    params = params_with([FUNCTION, ENDPOINT, {"kind": "reward_model"}, {}])
    assert [judge.title for judge in as_list(params.judge)] == ["function", "endpoint", "reward_model", "linear"]
    assert params.reward_model_judge is not None and params.reward_model_judge.use is None
    assert [judge.model for judge in params.endpoint_judges] == ["gpt"]
    assert params_with({}).reward_model_judge is None and params_with({}).endpoint_judges == ()


def test_two_judges_of_a_kind_need_two_names() -> None:
    assert len(as_list(params_with([ENDPOINT, ENDPOINT | {"name": "other"}, {}, {"name": "again"}]).judge)) == 4


def test_eight_judges_are_the_most() -> None:
    judges = [ENDPOINT | {"name": f"e{number}"} for number in range(9)]
    assert len(params_with(judges[:8]).endpoint_judges) == 8
    assert "at most 8" in error_message(judges)


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/chat/completions/", "https://api.openai.com/v1"),
        ("http://vllm.models:8000/v1", "http://vllm.models:8000/v1"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://[::1]:8000/v1//", "http://[::1]:8000/v1"),
    ],
)
def test_url_is_the_base_of_the_api(url: str, used: str) -> None:
    (judge,) = params_with(ENDPOINT | {"url": url}).endpoint_judges
    assert judge.url == used


@pytest.mark.parametrize("function", ["mine:score", "a.b_c.d1:_score", "_m:f"])
def test_function_names(function: str) -> None:
    assert as_list(params_with(FUNCTION | {"function": function}).judge)[0].model_dump()["function"] == function


# --- canonical JSON ---


@pytest.mark.parametrize(
    "judges",
    [
        *MINIMAL.values(),
        *COMPLETE.values(),
        *(list(sections.values())[:8] for sections in (MINIMAL, COMPLETE)),
        *(list(sections.values())[1:] for sections in (MINIMAL, COMPLETE)),
        [{}],
    ],
)
def test_canonical_json_round_trips(judges: Any) -> None:
    params = params_with(judges)
    stage = params.stage(JudgeStageConfig)
    for config in (params, stage):
        parsed = type(config).from_json(config.canonical_json())
        assert parsed == config and parsed.canonical_json() == config.canonical_json()
    assert stage.judge == params.judge and stage.seed == params.seed and stage.model == params.model
    assert isinstance(stage.judge, tuple) == isinstance(judges, list)


def test_floats_stay_floats() -> None:
    """A digest must not depend on whether a price is written as 1 or 1.0."""
    one, other = (params_with(ENDPOINT | {"output_price": price, "timeout_seconds": price}) for price in (1, 1.0))
    assert one.canonical_json() == other.canonical_json()


# --- what is refused ---


@pytest.mark.parametrize("kind", ["gpt", "", "Linear", None, 3, ["linear"], {"linear": 1}, "reward-model"])
def test_unknown_kind(kind: Any) -> None:
    message = (
        "kind is not one of linear, reward_model, endpoint, function, exact_match, regex, numeric, json_schema, command; "
        "correct it."
    )
    alone = error_message({"kind": kind})
    assert alone.startswith("judge is {'kind': ") and alone.endswith(message)
    assert error_message([MINIMAL["function"], {"kind": kind}]).startswith("judge.1 is {'kind': ")


@pytest.mark.parametrize("judge", ["linear", 3, None, True])
def test_judge_that_is_no_section(judge: Any) -> None:
    assert error_message(judge) == f"judge is {judge!r}: kind is not one of {', '.join(KINDS)}; correct it."
    assert error_message([{}, judge]).startswith(f"judge.1 is {judge!r}: kind is not one of ")


def test_empty_list() -> None:
    assert error_message([]).startswith("the parameters: judge is an empty list")


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        ("linear", "max_ngam", "max_ngram"),
        ("linear", "max_char_ngram", "max_character_ngram"),
        ("linear", "regularization", "regularisation"),
        ("reward_model", "uses", "use"),
        ("endpoint", "rubrik", "rubric"),
        ("endpoint", "rubric_fil", "rubric_file"),
        ("endpoint", "max_token", "max_tokens"),
        ("endpoint", "timeout", "timeout_seconds"),
        ("endpoint", "api_key", "api_key_variable"),
        ("function", "timeout", "timeout_seconds"),
        ("function", "sorce", "source"),
    ],
)
def test_misspelt_key_gets_the_nearest_of_its_kind(kind: str, wrong: str, right: str) -> None:
    section = MINIMAL[kind] | {wrong: 1}
    assert error_message(section) == f"judge.{wrong} is not a parameter; did you mean judge.{right}?"
    others = [{"name": "other"}, MINIMAL["numeric"], FUNCTION | {"name": "other"}]
    assert error_message([*others, section]) == f"judge.3.{wrong} is not a parameter; did you mean judge.3.{right}?"


@pytest.mark.parametrize("kind", KINDS)
def test_key_of_another_kind_is_refused_with_the_keys_of_this_one(kind: str) -> None:
    message = error_message(MINIMAL[kind] | {"xyzzy": 1})
    assert message == f"judge.xyzzy is not a parameter; valid here: {', '.join(KINDS[kind].model_fields)}."
    foreign = next(key for key in ("rubric", "max_ngram") if key not in KINDS[kind].model_fields)
    assert error_message(MINIMAL[kind] | {foreign: 1}).startswith(f"judge.{foreign} is not a parameter; ")


def test_mistake_in_a_list_is_reported_once() -> None:
    """And not as a list that is too short, because its only judge is wrong."""
    assert error_message([{"max_ngam": 1}]) == "judge.0.max_ngam is not a parameter; did you mean judge.0.max_ngram?"


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"kind": "endpoint", "model": "m"}, "judge.url is missing."),
        ({"kind": "endpoint", "url": "https://h/v1"}, "judge.model is missing."),
        ({"kind": "function"}, "judge.function is missing."),
        ([{}, {"kind": "function"}], "judge.1.function is missing."),
        ([ENDPOINT, ENDPOINT], "the parameters: two judges are named endpoint; give them different names (judge.NUMBER.name)."),
        ([ENDPOINT | {"name": "linear"}, {}], "the parameters: two judges are named linear; "),
        (
            [{"kind": "reward_model"}, {"kind": "reward_model", "name": "other"}],
            "the parameters: judge has two reward models, and there can be one; remove one of them.",
        ),
        (ENDPOINT | {"rubric": "a", "rubric_file": "b"}, "judge: rubric and rubric_file are both set; remove one of them."),
        (ENDPOINT | {"url": "api.example.com/v1"}, "judge.url: write it as https://HOST/v1."),
        (ENDPOINT | {"url": "ftp://api.example.com/v1"}, "judge.url: write it as https://HOST/v1."),
        (ENDPOINT | {"url": ""}, "judge.url: write it as https://HOST/v1."),
        (ENDPOINT | {"url": "https://"}, "judge.url: write it as https://HOST/v1."),
        (ENDPOINT | {"url": "https:///v1"}, "judge.url: write it as https://HOST/v1."),
        (ENDPOINT | {"url": "https://me:hunter2@api.example.com/v1"}, "judge.url: credentials are not allowed in settings"),
        (ENDPOINT | {"url": "https://api.example.com/v1?api_key=hunter2"}, "judge.url: credentials are not allowed in settings"),
        (ENDPOINT | {"rubric": "see https://me:hunter2@example.com"}, "judge.rubric: credentials are not allowed in settings"),
        (ENDPOINT | {"extra_body": {"a": ["https://me:hunter2@h"]}}, "judge.extra_body: credentials are not allowed"),
        (ENDPOINT | {"extra_body": [1]}, "judge.extra_body is [1]: "),
        (ENDPOINT | {"max_concurrency": 257}, "judge.max_concurrency is 257: "),
        (ENDPOINT | {"num_pairs": 0}, "judge.num_pairs is 0: "),
        (ENDPOINT | {"requests_per_minute": 0}, "judge.requests_per_minute is 0: "),
        (ENDPOINT | {"timeout_seconds": float("inf")}, "judge.timeout_seconds is inf: "),
        (ENDPOINT | {"input_price": -1}, "judge.input_price is -1: "),
        (ENDPOINT | {"rubric": "x" * MAX_JUDGES_BYTES}, "the parameters: the judges take "),
        (FUNCTION | {"source": "好" * (MAX_JUDGES_BYTES // 6)}, "the parameters: the judges take "),
        ({"features": "letters"}, "judge.features is 'letters': "),
        ({"regularisation": 0}, "judge.regularisation is 0: "),
        ({"name": "My judge"}, "judge.name is 'My judge': "),
        ({"name": "a/b"}, "judge.name is 'a/b': "),
        ({"name": "x" * 41}, "judge.name is 'xxx"),
    ],
)  # fmt: skip
def test_invalid_judges(judge: Any, message: str) -> None:
    reported = error_message(judge)
    assert reported.startswith(message)
    assert "hunter2" not in reported and len(reported) < 500 and reported.isprintable()


@pytest.mark.parametrize("key", ["model", "messages", "stream", "n"])
def test_request_fields_of_the_judge_cannot_be_overridden(key: str) -> None:
    message = f"judge.extra_body: {key} is set for each request; remove it."
    assert error_message(ENDPOINT | {"extra_body": {"seed": 1, key: 1}}) == message


def test_sampling_fields_can_be_changed_and_removed() -> None:
    """Reasoning models refuse temperature and max_tokens."""
    body = {"temperature": None, "max_tokens": None, "max_completion_tokens": 99}
    assert params_with(ENDPOINT | {"extra_body": body}).endpoint_judges[0].extra_body == body


@pytest.mark.parametrize(
    "function",
    [
        "mine",
        "mine:",
        ":score",
        "mine.py:score",
        "mine:a.b",
        "../mine:score",
        "a..b:c",
        "1a:b",
        "a:b c",
        "mine:score\n",
    ],
)
def test_bad_function_names(function: str) -> None:
    if function == "mine.py:score":  # the module py in the package mine
        assert params_with(FUNCTION | {"function": function})
        return
    assert error_message(FUNCTION | {"function": function}).startswith("judge.function is '")


@pytest.mark.parametrize("variable", ["sk-proj-0123456789abcdef", "MY KEY", "1KEY", ""])
def test_name_of_the_key_variable_is_no_key(variable: str) -> None:
    """A key that is pasted here would be copied into pipelines and reports; null is no key."""
    assert error_message(ENDPOINT | {"api_key_variable": variable}).startswith("judge.api_key_variable")
    assert params_with(ENDPOINT | {"api_key_variable": None}).endpoint_judges[0].api_key_variable is None


def test_stage_checks_names_too() -> None:
    text = params_with([ENDPOINT, ENDPOINT | {"name": "b"}]).stage(JudgeStageConfig).canonical_json()
    with pytest.raises(ValidationError, match="two judges are named endpoint"):
        JudgeStageConfig.from_json(text.replace('"name":"b"', '"name":"endpoint"'))
