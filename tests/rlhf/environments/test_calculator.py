from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.environments.calculator import Calculator, calculate

# Expressions with their exact values; None where something is divided by 0.
Node = tuple[str, Fraction | None]


def combine(children: tuple[Node, str, Node, str]) -> Node:
    (left, a), sign, (right, b), space = children
    text = f"({left}{space}{sign}{space}{right})"
    if a is None or b is None or (sign == "/" and b == 0):
        return text, None
    return text, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]


NUMBERS = st.tuples(st.integers(0, 9999), st.integers(0, 3)).map(
    lambda pair: (f"{pair[0]}.{pair[1]}" if pair[1] else str(pair[0]), Fraction(pair[0]) + Fraction(pair[1], 10))
)
NEGATIVE = NUMBERS.map(lambda node: (f"-{node[0]}", -node[1]))
EXPRESSIONS: Any = st.recursive(
    NUMBERS | NEGATIVE,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.sampled_from(["", " ", "  "])).map(combine),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(EXPRESSIONS)
def test_value_is_exact_to_six_decimals(node: Node) -> None:
    text, value = node
    found = calculate(text)
    if value is None or len(text) > 200:
        assert found == "error"
    elif value.denominator == 1:
        assert found == str(value.numerator)
    else:
        assert abs(Fraction(found) - value) <= Fraction(1, 2 * 10**6)
        assert found == found.rstrip("0").rstrip(".") or found == "0"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"), ("2 + 3 * 4", "14"), ("(2 + 3) * 4", "20"), ("10 - 4 - 3", "3"), ("8 / 2 / 2", "2"), ("--3", "3"),
        ("2 * -3", "-6"), ("10 / 4", "2.5"), ("1 / 3", "0.333333"), ("-1 / 3", "-0.333333"), ("2 / 3", "0.666667"),
        ("0.1 + 0.2", "0.3"), ("1 / 10000000", "0"), ("99999999999 * 99999999999", "9999999999800000000001"), (" 7 ", "7"),
    ],
)  # fmt: skip
def test_values_by_hand(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", " ", "1 / 0", "1 +", "(1", "1)", "1 2", "2 ** 3", "1e9", "x", "__import__('os')", "9" * 201, "1 + " * 60 + "1", "(" * 150,
     "1,000", "½", "٣", "1\x00"],
)  # fmt: skip
def test_anything_else_is_an_error(expression: str) -> None:
    assert calculate(expression) == "error"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" <calc>12 * 7</calc>", (" = 84\n", 0.0, False)),
        ("Let me see: <calc>12 * 7</calc> ", (" = 84\n", 0.0, False)),
        ("<calc>1</calc> and <calc>2+\n2</calc>", (" = 4\n", 0.0, False)),  # the last call, at the end
        ("<calc>oh <calc>3</calc>", (" = 3\n", 0.0, False)),
        ("<calc>oh</calc>", (" = error\n", 0.0, False)),
        ("84", ("", 0.0, True)),
        ("<calc>12 * 7</calc> = 84", ("", 0.0, True)),
        ("<calc>12 * 7</calc>\n", ("", 0.0, True)),
        ("12 * 7</calc>", ("", 0.0, True)),
        ("", ("", 0.0, True)),
    ],
)
def test_call_at_the_end_of_a_turn_is_answered_and_anything_else_ends_the_response(text: str, answer: Any) -> None:
    assert Calculator().step(text) == answer
