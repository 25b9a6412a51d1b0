"""Scales of charts: from values to coordinates, and round numbers for the ticks of an axis."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map of [low, high] to [start, end], in pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def limits(values: Iterable[float | None], *, include: Sequence[float] = ()) -> tuple[float, float]:
    """Ends of an axis that shows these values; of equal values an interval around them. None are gaps. (0, 1) without values."""
    found = [value for value in values if value is not None and math.isfinite(value)] + list(include)
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    if low == high:
        half = abs(low) / 10 or 0.5
        return low - half, high + half
    return low, high


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most low to at least high, in steps of 1, 2, 2.5 or 5 times a power of ten: about `count` steps."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in STEPS if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Ticks as texts with as many decimals as their step needs."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    decimals = next((d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), 6)
    return [number_text(value, decimals) for value in values]


def number_text(value: float, decimals: int) -> str:
    """A number with a true minus sign, and without one for zero."""
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "\u2212")
