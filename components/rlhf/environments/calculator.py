"""A calculator as an environment: the value of an arithmetic expression, by exact fractions and without evaluating any code."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from components.rlhf.data.records import Prompt
from components.rlhf.environments.protocol import Step

CALL = re.compile(r"<calc>((?:(?!<calc>).)*)</calc>[^\S\n]*\Z", re.DOTALL)
TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)|([-+*/()]))")
MAX_CHARS = 200  # of an expression, so that values stay small and nesting shallow
DECIMALS = 6  # of a value that is no integer
ERROR = "error"


class Calculator:
    """Answers <calc>12 * 7</calc> at the end of a turn by " = 84" and a line break; any other turn ends the response.

    Its rewards are 0: whether the answer is right is for a reward that knows it. Implements Environment.
    """

    def reset(self, prompt: str, columns: Mapping[str, str]) -> None:
        pass

    def step(self, text: str) -> tuple[str, float, bool]:
        call = CALL.search(text)
        return (f" = {calculate(call[1])}\n", 0.0, False) if call else ("", 0.0, True)


class CalculatorHost:
    """One calculator for all responses: it has no state. Implements Host."""

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, str]:
        return {}

    def step(self, texts: Mapping[int, str]) -> dict[int, Step]:
        found = {}
        for number, text in texts.items():
            observation, reward, done = Calculator().step(text)
            found[number] = Step(observation=observation, reward=reward, done=done)
        return found

    def end(self, numbers: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass


def calculate(expression: str) -> str:
    """The value of numbers, + - * / and parentheses: an integer, or a decimal rounded to 6 places; "error" for anything else."""
    try:
        value = _Parser(expression).value()
    except (ValueError, ZeroDivisionError):
        return ERROR
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**DECIMALS)  # half to even, exactly
    digits = str(abs(scaled)).rjust(DECIMALS + 1, "0")
    text = f"{digits[:-DECIMALS]}.{digits[-DECIMALS:]}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text


class _Parser:
    """Recursive descent: sum = product ((+|-) product)*, product = factor ((*|/) factor)*, factor = -factor | (sum) | number."""

    def __init__(self, expression: str) -> None:
        """Raises ValueError for a text with other characters, or a long one."""
        if len(expression) > MAX_CHARS:
            raise ValueError("too long")
        self.tokens: list[str] = []
        position, text = 0, expression.rstrip()
        while position < len(text):
            found = TOKEN.match(text, position)
            if not found:
                raise ValueError(f"unexpected {text[position]!r}")
            self.tokens.append(found[1] or found[2])
            position = found.end()
        self.place = 0

    def value(self) -> Fraction:
        value = self._sum()
        if self._next():
            raise ValueError(f"unexpected {self._next()}")
        return value

    def _next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self, choices: str) -> str:
        token = self._next()
        if not token or token not in choices:
            return ""
        self.place += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+-"):
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while sign := self._take("*/"):
            other = self._factor()
            value = value * other if sign == "*" else value / other
        return value

    def _factor(self) -> Fraction:
        if self._take("-"):
            return -self._factor()
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        token = self._next()
        if not token or not token[0].isdigit():
            raise ValueError("a number is missing")
        self.place += 1
        return Fraction(token)
