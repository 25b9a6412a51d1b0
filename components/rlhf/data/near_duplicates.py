"""Finds texts that are nearly equal, so that they get one role together and no role learns what another one measures.

Two texts are near-duplicates if the sets of their character 5-grams have at least a given Jaccard similarity (Broder, "On the
resemblance and containment of documents", 1997). Candidates come from MinHash signatures, made by datasketch, in bands of rows
(locality-sensitive hashing; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4). Every candidate is
verified with the sets themselves: no pair is near-duplicate by accident of a hash, but a few near-duplicates are not found.

The bands are here and not datasketch's MinHashLSH, which keeps a Python set per bucket, several times the memory, and returns whole
buckets, whose verification is quadratic when thousands of prompts are made from one template.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

NGRAM = 5  # characters
MIN_THRESHOLD = 0.5  # below, unrelated texts share bands, and the limits below would hide near-duplicates
MIN_RECALL = 0.99  # of a pair that is exactly at the threshold
MAX_HASHES = 256  # per text
# The limits that make the worst case linear: a text is compared with its neighbors in a bucket, the most alike first, until both
# texts of a pair have had this many failures in this band.
WINDOW = 32
MAX_FAILURES = 4
MAX_EXAMPLES = 10
CACHED_TEXTS = 8192
PAIRS_AT_ONCE = 16384
GROUPING_SEED, OVERLAP_SEED = 1, 2


@dataclass(frozen=True)
class Overlap:
    """Texts of one role that are equal or near-duplicate to a text of another role."""

    total: int  # distinct texts of each role that have such a text in another role
    examples: tuple[tuple[str, str, str, str], ...]  # (role, text, other role, other text), at most MAX_EXAMPLES


def group_near_duplicates(texts: Sequence[str], *, threshold: float) -> list[int]:
    """For each text, the index of the first text of its group; the index of the text itself if it is alone or first.

    Two texts are in one group if their similarity is at least threshold, or if a chain of such pairs connects them. Texts are
    taken as they are; callers normalize case and spaces. A text shorter than 5 characters is near-duplicate only to equal texts.
    With a threshold of 1 or more, only equal texts are grouped.

    A pair at the threshold is found with a probability of at least 0.99, namely 1 - (1 - threshold**rows)**bands with the numbers
    of `bands_and_rows`: 0.9916 at 0.8. More similar pairs are found more often. Where many texts are alike but below the
    threshold, such as thousands made from one template, the limits WINDOW and MAX_FAILURES can lower it. At most
    bands * MAX_FAILURES * len(texts) comparisons fail, and fewer than len(texts) succeed. The groups depend only on the set of texts.

    Raises ValueError when the threshold is below 0.5.
    """
    distinct = sorted(set(texts))  # so that the order of the input does not matter
    groups = _Groups(len(distinct))
    for left, right in _near_pairs(distinct, threshold, GROUPING_SEED, needed=groups.are_apart):
        groups.join(left, right)
    roots = {text: groups.root(number) for number, text in enumerate(distinct)}
    first: dict[int, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(roots[text], index)
    return [first[roots[text]] for text in texts]


def overlap(groups_of: Mapping[str, Sequence[str]], *, threshold: float) -> Overlap:
    """The texts of each role that are equal or near-duplicate to a text of another role.

    This checks a split that was made with group_near_duplicates. It uses other hash functions, so that it finds most pairs that
    the grouping missed, and like it, finds a pair at the threshold with a probability of at least 0.99. It compares pairs and
    makes no chains: texts that only a chain connects do not count.

    Raises ValueError when the threshold is below 0.5.
    """
    roles: dict[str, list[str]] = {}
    for role in sorted(groups_of):
        for text in set(groups_of[role]):
            roles.setdefault(text, []).append(role)
    distinct = sorted(roles)
    found: set[tuple[str, str]] = set()
    examples: list[tuple[str, str, str, str]] = []

    def new(left: str, right: str) -> list[tuple[str, str, str, str]]:
        """The pairs across roles of two overlapping texts that would add one of them to those found."""
        across = [(one, left, other, right) for one in roles[left] for other in roles[right] if one != other]
        return [pair for pair in across if not {pair[:2], pair[2:]} <= found]

    def add(pairs: Iterable[tuple[str, str, str, str]]) -> None:
        for pair in pairs:
            found.update((pair[:2], pair[2:]))
            examples.append(pair)

    for text in distinct:
        add(pair for pair in new(text, text) if pair[0] < pair[2])
    for left, right in _near_pairs(
        distinct, threshold, OVERLAP_SEED, needed=lambda one, other: bool(new(distinct[one], distinct[other]))
    ):
        add(new(distinct[left], distinct[right]))
    return Overlap(total=len(found), examples=tuple(examples[:MAX_EXAMPLES]))


def similarity(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard similarity of two sets of which one is not empty."""
    common = len(left & right)
    return common / (len(left) + len(right) - common)


def ngrams(text: str) -> frozenset[str]:
    """The set of character n-grams; a shorter text is its only n-gram."""
    return frozenset(text[start : start + NGRAM] for start in range(max(1, len(text) - NGRAM + 1)))


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """The most rows per band, and the fewest such bands, that find a pair at the threshold with MIN_RECALL within MAX_HASHES.

    A row agrees with the probability of the similarity s, so one of b bands with r rows agrees with 1 - (1 - s**r)**b. Many rows
    keep texts below the threshold apart.
    """
    fitting = []
    for rows in range(1, MAX_HASHES + 1):
        misses = math.log1p(-(threshold**rows))  # logarithm of the probability that one band misses the pair
        bands = math.ceil(math.log(1 - MIN_RECALL) / misses)
        if bands * rows <= MAX_HASHES:
            fitting.append((bands, rows))
    return fitting[-1]


class _Groups:
    """Disjoint sets of the numbers below size."""

    def __init__(self, size: int) -> None:
        self.parents = list(range(size))

    def root(self, member: int) -> int:
        while self.parents[member] != member:
            self.parents[member] = self.parents[self.parents[member]]  # halves the path for the next call
            member = self.parents[member]
        return member

    def are_apart(self, left: int, right: int) -> bool:
        return self.root(left) != self.root(right)

    def join(self, left: int, right: int) -> None:
        low, high = sorted((self.root(left), self.root(right)))
        self.parents[high] = low


def _near_pairs(
    texts: Sequence[str], threshold: float, seed: int, *, needed: Callable[[int, int], bool]
) -> Iterator[tuple[int, int]]:
    """Pairs of numbers of distinct, sorted texts that are near-duplicates. Pairs that are not needed at their turn are not compared."""
    if not threshold >= MIN_THRESHOLD:  # also true of NaN
        raise ValueError(f"threshold is {threshold}; near-duplicates need at least {MIN_THRESHOLD}")
    long = [number for number, text in enumerate(texts) if len(text) >= NGRAM]  # a shorter text shares no n-gram
    if threshold >= 1 or len(long) < 2:
        return
    cached_ngrams = functools.lru_cache(maxsize=CACHED_TEXTS)(ngrams)
    bands, rows = bands_and_rows(threshold)
    signatures = _signatures([texts[number] for number in long], bands * rows, seed)
    for candidates in _candidates(signatures, bands, rows):
        failures = [0] * len(long)
        for one, other in candidates:
            left, right = long[one], long[other]
            if min(failures[one], failures[other]) >= MAX_FAILURES or not needed(left, right):
                continue
            if similarity(cached_ngrams(texts[left]), cached_ngrams(texts[right])) >= threshold:
                yield left, right
            else:
                failures[one] += 1
                failures[other] += 1


def _signatures(texts: Sequence[str], hashes: int, seed: int) -> NDArray[np.uint32]:
    """MinHash signatures of texts of at least NGRAM characters, [text, hash]."""
    signatures = np.empty((len(texts), hashes), dtype=np.uint32)
    hashed = (_hashed_ngrams(text).tolist() for text in texts)  # of Python's integers, which `int` returns fastest
    for number, sketch in enumerate(MinHash.generator(hashed, num_perm=hashes, seed=seed, hashfunc=int)):
        signatures[number] = sketch.hashvalues
    return signatures


def _hashed_ngrams(text: str) -> NDArray[np.uint64]:
    """A 32-bit number for each n-gram, all n-grams at once. Not Python's hash, which differs between processes."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = len(characters) - NGRAM + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(NGRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + characters[offset : offset + count]  # wraps around
        hashes ^= hashes >> np.uint64(29)  # brings the high bits back down
    return hashes >> np.uint64(32)


def _candidates(signatures: NDArray[np.uint32], bands: int, rows: int) -> Iterator[Iterator[tuple[int, int]]]:
    """For each band, the pairs that agree in it, the most alike signatures first; each pair only once.

    A bucket's members are in the order of their texts. Each is paired with the next WINDOW ones, which are all in a small bucket.
    """
    keys = np.empty((len(signatures), bands), dtype=np.int32)
    places = np.empty_like(keys)
    for band in range(bands):
        in_band = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        as_bytes = in_band.view(np.dtype((np.void, in_band.itemsize * rows)))  # compared as a whole, so no keys collide
        keys[:, band] = np.unique(as_bytes, return_inverse=True)[1].ravel()
        order = np.argsort(keys[:, band], kind="stable")
        places[order, band] = np.arange(len(order))
        left, right = _neighbors(keys[order, band])
        left, right = order[left], order[right]
        likeness = np.empty(len(left), dtype=np.float32)
        fresh = np.empty(len(left), dtype=bool)
        for start in range(0, len(left), PAIRS_AT_ONCE):
            chunk = slice(start, start + PAIRS_AT_ONCE)
            one, other = left[chunk], right[chunk]
            likeness[chunk] = (signatures[one] == signatures[other]).mean(axis=1)
            same_bucket = keys[one, :band] == keys[other, :band]
            near = np.abs(places[one, :band] - places[other, :band]) <= WINDOW
            fresh[chunk] = ~(same_bucket & near).any(axis=1)
        ranking = np.argsort(-likeness, kind="stable")
        ranking = ranking[fresh[ranking]]
        yield zip(left[ranking].tolist(), right[ranking].tolist(), strict=True)


def _neighbors(keys: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs of places with equal keys that are at most WINDOW apart. Keys are sorted."""
    lefts, rights = [], []
    left = np.arange(len(keys))
    for distance in range(1, WINDOW + 1):
        left = left[left + distance < len(keys)]
        left = left[keys[left] == keys[left + distance]]
        lefts.append(left)
        rights.append(left + distance)
    return np.concatenate(lefts), np.concatenate(rights)
