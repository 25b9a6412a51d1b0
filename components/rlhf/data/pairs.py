"""Preference pairs: made from ratings, and capped per prompt."""

import random
from collections import defaultdict
from collections.abc import Sequence

from components.rlhf.data.records import PreferencePair, RatedText


def pairs_from_ratings(rated: Sequence[RatedText], *, min_gap: float, seed: int) -> list[PreferencePair]:
    """For each text the partner with the longest shared opening whose mean rating differs by at least min_gap.

    The shared opening words are the prompt, and what follows in the better and the worse rated text is chosen and rejected.
    Texts without such a partner (no shared first word, or no gap) form no pair. margin is the gap.
    """
    generator = random.Random(seed)
    by_first_word: dict[str, list[tuple[list[str], float]]] = defaultdict(list)
    for text in rated:
        words = (text.prompt + text.completion).split()
        by_first_word[words[0]].append((words, text.rating))
    pairs: dict[tuple[str, str, str], PreferencePair] = {}
    for bucket in by_first_word.values():
        generator.shuffle(bucket)
        for index, (words, rating) in enumerate(bucket):
            partners = [other for other in bucket[index + 1 :] + bucket[:index] if abs(other[1] - rating) >= min_gap]
            if not partners:
                continue
            partner, partner_rating = max(partners, key=lambda other: _shared(words, other[0]))
            better, worse = (words, partner) if rating > partner_rating else (partner, words)
            cut = min(_shared(words, partner), len(words) - 1, len(partner) - 1)  # leave each a continuation
            pair = PreferencePair(
                prompt=" ".join(better[:cut]),
                chosen=" " + " ".join(better[cut:]),
                rejected=" " + " ".join(worse[cut:]),
                margin=round(abs(rating - partner_rating), 6),
            )
            pairs[pair.prompt, pair.chosen, pair.rejected] = pair
    shuffled = list(pairs.values())
    generator.shuffle(shuffled)
    return shuffled


def cap_per_prompt(pairs: Sequence[PreferencePair], limit: int, *, seed: int) -> list[PreferencePair]:
    """At most limit pairs of each prompt, chosen by a seeded shuffle; the rest keeps its shuffled order."""
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    counts: dict[str, int] = defaultdict(int)
    kept = []
    for pair in shuffled:
        counts[pair.prompt] += 1
        if counts[pair.prompt] <= limit:
            kept.append(pair)
    return kept


def _shared(words: list[str], other: list[str]) -> int:
    """How many opening words two texts share."""
    count = 0
    for mine, theirs in zip(words, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
