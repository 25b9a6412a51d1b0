"""Preference pairs: built from ratings, and capped per prompt."""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from components.rlhf.data.records import PreferencePair, RatedText

MAX_RATED_ANSWERS = 100  # of one prompt, because the number of pairs grows with its square


def pairs_from_ratings(rated: Sequence[RatedText], *, min_gap: float, seed: int) -> list[PreferencePair]:
    """Pair each text with the one that shares its longest prefix of words and whose mean rating differs by at least min_gap.

    The shared prefix is the prompt; the rest of the better and of the worse rated text is chosen and rejected. A text without
    a partner (no shared first word, or too small a difference) forms no pair. margin is the difference of the ratings.
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
            partner, partner_rating = max(partners, key=lambda other: _common_prefix_length(words, other[0]))
            better, worse = (words, partner) if rating > partner_rating else (partner, words)
            # Leave each text at least one word as its completion.
            cut = min(_common_prefix_length(words, partner), len(words) - 1, len(partner) - 1)
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


def pairs_per_prompt(rated: Sequence[RatedText], *, min_gap: float, seed: int) -> list[PreferencePair]:
    """Every two answers to the same prompt whose ratings differ by at least min_gap. margin is the difference of the ratings.

    Of a prompt with more than MAX_RATED_ANSWERS answers, a random subset is paired.
    """
    generator = random.Random(seed)
    by_prompt: dict[str, list[RatedText]] = defaultdict(list)
    for text in rated:
        by_prompt[text.prompt].append(text)
    pairs = []
    for texts in by_prompt.values():
        for first, second in combinations(generator.sample(texts, min(len(texts), MAX_RATED_ANSWERS)), 2):
            better, worse = (first, second) if first.rating > second.rating else (second, first)
            gap = better.rating - worse.rating
            if gap > 0 and gap >= min_gap and better.completion != worse.completion:
                pairs.append(
                    PreferencePair(
                        prompt=better.prompt,
                        chosen=better.completion,
                        rejected=worse.completion,
                        margin=round(gap, 6),
                        conversation=better.conversation,
                    )
                )
    return pairs


def cap_per_prompt(pairs: Sequence[PreferencePair], limit: int, *, seed: int) -> list[PreferencePair]:
    """At most limit pairs per prompt, chosen at random with the seed and returned in shuffled order."""
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    counts: dict[str, int] = defaultdict(int)
    kept = []
    for pair in shuffled:
        counts[pair.prompt] += 1
        if counts[pair.prompt] <= limit:
            kept.append(pair)
    return kept


def _common_prefix_length(first: list[str], second: list[str]) -> int:
    """Number of words at the beginning that two texts have in common."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
