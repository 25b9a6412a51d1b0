"""Checks of responses against slow or independent versions of themselves, and in processes that nothing can hang."""

import fractions
import json
import re
import time
import urllib.request
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.config.scoring import ExactMatch, JsonSchema, Numeric, Regex
from components.rlhf.rewards import check_pool
from components.rlhf.rewards.check_pool import CheckPool
from components.rlhf.rewards.checks import BadAnswerError, equal_text, matches, same_value, satisfies, unfenced
from components.rlhf.rewards.owner import Owner
from components.rlhf.rewards.verifiable import CheckScorer, ExactMatchScorer
from components.rlhf.text.errors import InputError
from tests.support.reward_server import Logs, completions

OWNER = Owner(title="reward right", key="ppo.rewards.0")
WORDS = st.text(alphabet="aAß #\n4é", max_size=8)


@pytest.fixture(scope="module")
def pool() -> Any:
    pool = CheckPool()
    yield pool
    pool.close()


# --- exact match ---


def slowly_equal(response: str, answer: str, after: str, ignore_case: bool) -> bool:
    if after:
        starts = [i for i in range(len(response)) if response[i : i + len(after)] == after]
        if not starts:
            return False
        response = response[starts[-1] + len(after) :]
    while response and response[0].isspace():
        response = response[1:]
    while response and response[-1].isspace():
        response = response[:-1]
    answer = answer.strip()
    return response == answer or (ignore_case and response.casefold() == answer.casefold())


@given(WORDS, WORDS, st.sampled_from(["", "#", "##", "4"]), st.booleans())
def test_equal_text_is_that_of_a_slow_version(response: str, answer: str, after: str, ignore_case: bool) -> None:
    expected = slowly_equal(response, answer, after, ignore_case)
    assert equal_text(response, answer, after=after, ignore_case=ignore_case) == expected


def test_exact_match_by_hand() -> None:
    config = ExactMatch(kind="exact_match", after="####", ignore_case=True)
    rows = completions("so #### Yes \n", "#### no #### yes", "yes", "#### yes!", "", answer="YES")
    assert ExactMatchScorer(config, OWNER).score(rows).tolist() == [1, 1, 0, 0, 0]
    assert ExactMatchScorer(ExactMatch(kind="exact_match"), OWNER).score(rows).tolist() == [0, 0, 0, 0, 0]
    assert ExactMatchScorer(config, OWNER).score([]).shape == (0,)


# --- regular expressions ---


@given(st.lists(st.sampled_from(["<a>x</a>", "<a>y</a>", "x", "<a>", "\n"]), max_size=6), st.sampled_from(["x", "y"]))
def test_last_match_is_compared(parts: list[str], answer: str) -> None:
    response = "".join(parts)
    found = [part[3] for part in re.split(r"(?=<a>[xy]</a>)", response) if re.match(r"<a>[xy]</a>", part)]
    assert matches(r"<a>(x|y)</a>", response, answer) == (bool(found) and found[-1] == answer)
    assert matches(r"<a>(x|y)</a>", response, None) == bool(found)


def test_match_without_a_group_or_with_an_empty_one() -> None:
    assert matches(r"\d+", "1 then 22", "22") and not matches(r"\d+", "1 then 22", "1")
    assert not matches(r"a(b)?", "a", "b") and not matches("", "anything", "x") and matches("", "anything", None)


# --- numbers ---

NUMBERS = st.fractions(min_value=-1000, max_value=1000, max_denominator=20)


def written(number: fractions.Fraction, form: int) -> str:
    if number.denominator == 1:
        return [f"{number}", f"${number}$", rf"\boxed{{{number}}}", f"{number}.0"][form]
    sign, top, bottom = "-" * (number < 0), abs(number.numerator), number.denominator
    return [
        f"{number}",
        f"${number}$",
        rf"\boxed{{{sign}\frac{{{top}}}{{{bottom}}}}}",
        rf"${sign}\frac{{{top}}}{{{bottom}}}$",
    ][form]


@settings(max_examples=30)
@given(NUMBERS, NUMBERS, st.integers(0, 3), st.integers(0, 3))
def test_numbers_have_the_same_value_exactly_if_they_are_equal(
    right: fractions.Fraction, other: fractions.Fraction, form: int, other_form: int
) -> None:
    answer = written(right, form)
    assert same_value(f"First I add. The answer is {written(right, other_form)}", answer)
    assert same_value(f"The answer is {written(other, other_form)}.", answer) == (other == right)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("The answer is 1,000.", "1000", True), ("1000", "1,000", True), ("0.5", r"\frac{1}{2}", True), ("50%", "0.5", True),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True), ("$1+x$", "x+1", True), ("$x$", "x+1", False), ("it is 7, or 8", "7", False),
        (r"\boxed{\text{Tom}}", r"\text{Tom}", True), ("", "3", False), ("no idea", "3", False), ("3.14159", r"\pi", False),
        ("4+3=8. No, 7", "7", True), ("-3", "3", False), (r"$\{1,2\}$", r"\{2,1\}", True), ("12", "1", False),
    ],
)  # fmt: skip
def test_values_by_hand(response: str, answer: str, expected: bool) -> None:
    assert same_value(response, answer) == expected


@pytest.mark.parametrize("answer", ["seven", "7 apples", "yes", "Tom", "семь", "?", "18 dollars"])
def test_answers_that_are_no_value_are_refused_instead_of_never_equal(answer: str) -> None:
    with pytest.raises(BadAnswerError):
        same_value("7", answer)


# --- JSON ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)
SCHEMAS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "object", "required": ["a"]}, lambda v: isinstance(v, dict) and "a" in v),
    ({"type": "array", "maxItems": 1}, lambda v: isinstance(v, list) and len(v) <= 1),
    ({"type": "integer", "minimum": 2}, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 2),
    ({"$defs": {"s": {"type": "string"}}, "$ref": "#/$defs/s"}, lambda v: isinstance(v, str)),
    ({"enum": [None, "a"]}, lambda v: v is None or v == "a"),
]


@given(
    VALUES,
    st.sampled_from(SCHEMAS),
    st.sampled_from(["{}", " {}\n", "```json\n{}\n```", "```\n{}```", "It is {}", "{},", "```json\n{}"]),
)
def test_json_that_satisfies_a_schema(value: Any, schema: tuple[dict[str, Any], Any], form: str) -> None:
    is_json = form in ("{}", " {}\n", "```json\n{}\n```", "```\n{}```")
    response = form.replace("{}", json.dumps(value))
    assert satisfies(response, json.dumps(schema[0])) == (is_json and schema[1](value))


@pytest.mark.parametrize(
    "response", ["NaN", "[NaN]", "1e999", '{"a": 1, "a": 2}', "[" * 100_000, "", "```\n```", "{'a': 1}", "[1,]"]
)
def test_what_is_not_strict_json(response: str) -> None:
    assert not satisfies(response, "{}")


@given(st.text(alphabet="`\nab{}", max_size=12))
def test_unfenced_is_part_of_the_text(text: str) -> None:
    assert unfenced(text) in text.strip()


def test_schemas_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are not downloaded: that would be a request for each response."""
    downloads: list[Any] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: downloads.append(args))
    for schema, problem in (
        ('{"type": "objec"}', "is no JSON schema"),
        ("{", "is no JSON schema"),
        ('{"$ref": "http://127.0.0.1:1/s.json"}', "refers to http://127.0.0.1:1/s.json"),
        ('{"$ref": "#/$defs/missing"}', "refers to"),
    ):
        with pytest.raises(BadAnswerError, match=problem):
            satisfies("{}", schema)
    assert downloads == []


# --- in processes ---


def scorer_of(config: Any, pool: CheckPool, log: Logs | None = None) -> CheckScorer:
    return CheckScorer(config, OWNER, pool, Logs() if log is None else log)


def test_scores_of_each_kind(pool: CheckPool) -> None:
    regex = Regex(kind="regex", pattern=r"<answer>(.*?)</answer>", column="answer")
    rows = completions("<answer> 4 </answer>", "<answer>5</answer>", "4", answer="4")
    assert scorer_of(regex, pool).score(rows).tolist() == [1, 0, 0]
    assert scorer_of(Regex(kind="regex", pattern="^<"), pool).score(completions("<", "a")).tolist() == [1, 0]
    assert scorer_of(Numeric(kind="numeric"), pool).score(rows).tolist() == [1, 0, 1]
    schema = JsonSchema(kind="json_schema", schema_text='{"type": "integer"}')
    assert scorer_of(schema, pool).score(completions("4", '"4"')).tolist() == [1, 0]
    by_row = JsonSchema(kind="json_schema", column="schema")
    rows = completions("4", "4", schema=['{"type": "integer"}', '{"type": "string"}'])
    assert scorer_of(by_row, pool).score(rows).tolist() == [1, 0]
    assert scorer_of(schema, pool).score([]).shape == (0,)


def test_many_responses_keep_their_order(pool: CheckPool) -> None:
    rows = completions(*map(str, range(300)), answer=[str(i - i % 3) for i in range(300)])
    scores = scorer_of(Regex(kind="regex", pattern=r"\d+", column="answer"), pool).score(rows)
    assert scores.tolist() == [float(i % 3 == 0) for i in range(300)]


def test_checks_that_hang_score_zero(pool: CheckPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backtracking is interrupted; 2**(10**9) is one operation that is not, so its process is ended and replaced."""
    monkeypatch.setattr(check_pool, "SECONDS", 0.5)
    monkeypatch.setattr(check_pool, "GRACE_SECONDS", 0.5)
    log = Logs()
    started = time.monotonic()
    regex = scorer_of(Regex(kind="regex", pattern="(a+)+$"), pool, log)
    assert regex.score(completions("aa", "a" * 50 + "b", "b", "ca")).tolist() == [1, 0, 0, 1]
    assert regex.counts["failed"] == 1 and "1 of 4 responses could not be checked" in log[-1]
    numeric = scorer_of(Numeric(kind="numeric"), pool)
    assert numeric.score(completions("7", "$2^{1000000000}$", "7", answer="7")).tolist() == [1, 0, 1]
    assert numeric.score(completions("7", "$9^{9^{9^9}}$", "7", answer="7")).tolist() == [1, 0, 1]
    assert numeric.counts["failed"] == 2
    assert numeric.score(completions("7", "8", answer="7")).tolist() == [1, 0]
    assert time.monotonic() - started < 30


def test_pattern_that_hangs_on_everything_is_one_sentence(pool: CheckPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_pool, "SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"^The reward right is of no use: .*; simplify ppo.rewards.0.pattern\.$"):
        scorer_of(Regex(kind="regex", pattern="(a+)+$"), pool).score(completions(*["a" * 50 + "b"] * 40))
    assert time.monotonic() - started < 20  # the others are not tried


@pytest.mark.parametrize(
    ("config", "columns", "problem"),
    [
        (
            Numeric(kind="numeric"),
            {},
            "needs the column answer, which is missing in the data of prompt p0; add it to data.prompts.keep",
        ),
        (Numeric(kind="numeric"), {"answer": " "}, "needs the column answer, which is empty in the data of prompt p0"),
        (
            Numeric(kind="numeric"),
            {"answer": "seven"},
            "the column answer of prompt p0, 'seven', is neither a number nor a LaTeX",
        ),
        (Regex(kind="regex", pattern="x", column="target"), {"answer": "x"}, "needs the column target"),
        (
            JsonSchema(kind="json_schema", column="schema"),
            {"schema": "{"},
            "the column schema of prompt p0, '{', is no JSON schema",
        ),
        (JsonSchema(kind="json_schema", schema_text='{"$ref": "#/a"}'), {}, "schema_text refers to"),
    ],
)
def test_data_that_is_wrong_is_one_sentence(
    pool: CheckPool, config: Any, columns: dict[str, str], problem: str
) -> None:
    for check in (
        lambda scorer: scorer.score(completions("1", **columns)),
        lambda scorer: scorer.check_prompts([c.prompt for c in completions("1", **columns)]),
    ):
        with pytest.raises(InputError) as error:
            check(scorer_of(config, pool))
        assert str(error.value).startswith("The reward right ") and problem in str(error.value)


def test_pool_can_be_closed_twice_and_used_again() -> None:
    own = CheckPool()
    scorer = scorer_of(Regex(kind="regex", pattern="a"), own)
    assert scorer.score(completions("a")).tolist() == [1]
    own.close()
    own.close()
    assert scorer.score(completions("a")).tolist() == [1]
    own.close()
