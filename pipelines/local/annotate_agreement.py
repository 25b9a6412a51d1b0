"""How far people agree with one another, with the judge and with the reward model."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence


def cohen_kappa(first: Mapping[str, Hashable], second: Mapping[str, Hashable]) -> float | None:
    """Cohen's kappa of two raters over the items that both answered; None if chance alone explains full agreement, or without items.

    Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    items = first.keys() & second.keys()
    if not items:
        return None
    observed = sum(first[item] == second[item] for item in items) / len(items)
    counts = Counter(first[item] for item in items), Counter(second[item] for item in items)
    expected = sum(counts[0][label] * counts[1][label] for label in counts[0]) / len(items) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(items: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal labels: items are the labels of each item, by any number of raters.

    None if no item has two labels or all labels are the same. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, section C.
    """
    counts = [Counter(labels) for labels in items if len(labels) >= 2]
    total = Counter[Hashable]()
    for count in counts:
        total += count
    num = total.total()
    observed = sum(_unequal(count) / (count.total() - 1) for count in counts)
    return None if not _unequal(total) else 1 - (num - 1) * observed / _unequal(total)


def _unequal(count: Counter[Hashable]) -> int:
    """Number of ordered pairs of different labels."""
    return int(count.total() ** 2 - sum(number**2 for number in count.values()))
