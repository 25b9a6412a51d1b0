import itertools
import os
import random
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from components.rlhf.data import near_duplicates
from components.rlhf.data.near_duplicates import Overlap, bands_and_rows, group_near_duplicates, overlap

ROOT = Path(__file__).resolve().parents[3]
FOX = "the quick brown fox jumps over the lazy dog while the cat sleeps on the warm stove"
LONG_PROMPT = "write a short story about a small village by the sea in which nobody has ever seen a ship from far away"


def letters(generator: random.Random, length: int) -> str:
    return "".join(generator.choices(string.ascii_lowercase, k=length))


def exact_similarity(left: str, right: str) -> float:
    """Jaccard similarity of sets of 5-grams, element by element."""
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} or {text} for text in (left, right)]
    return sum(gram in sets[1] for gram in sets[0]) / len(sets[0] | sets[1])


def exact_groups(texts: Sequence[str], threshold: float) -> list[int]:
    """All pairs, and the smallest index spread along them until nothing changes."""
    labels = list(range(len(texts)))
    pairs = [
        (i, j)
        for i, j in itertools.combinations(labels, 2)
        if texts[i] == texts[j] or exact_similarity(texts[i], texts[j]) >= threshold
    ]
    for _ in texts:
        for i, j in pairs:
            labels[i] = labels[j] = min(labels[i], labels[j])
    return labels


def exact_overlap(texts_of: dict[str, list[str]], threshold: float) -> int:
    members = {(role, text) for role, texts in texts_of.items() for text in texts}
    return sum(
        any(role != other and (a == b or exact_similarity(a, b) >= threshold) for other, b in members)
        for role, a in members
    )


texts_that_overlap = st.one_of(
    st.text("ab", max_size=60),
    st.text("abc", max_size=20).map(lambda text: FOX[:40] + text),
    st.integers(0, 30).map(lambda cut: FOX[cut : cut + 50]),
    st.text(st.characters(), max_size=8),  # includes lone surrogates
)
# Of 9 texts, a text has at most 8 failures; so with MAX_FAILURES of 8, only a miss of all bands hides a pair.
few_texts = st.lists(texts_that_overlap, max_size=9)
thresholds = st.sampled_from([0.5, 0.6, 0.75, 0.8, 0.9, 0.99])


@given(texts=few_texts, threshold=thresholds)
@example(texts=["\ud800" * 5, "\ud800" * 6 + "a"], threshold=0.5)
def test_groups_are_those_of_all_pairs(texts: list[str], threshold: float) -> None:
    """With so many bands that less than one pair in 10**9 at the threshold is missed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "MIN_RECALL", 1 - 1e-9)
        patch.setattr(near_duplicates, "MAX_HASHES", 512)
        patch.setattr(near_duplicates, "MAX_FAILURES", 8)
        assert group_near_duplicates(texts, threshold=threshold) == exact_groups(texts, threshold)


@given(texts=few_texts, threshold=thresholds)
def test_no_group_is_larger_than_that_of_all_pairs(texts: list[str], threshold: float) -> None:
    exact = exact_groups(texts, threshold)
    for index, representative in enumerate(group_near_duplicates(texts, threshold=threshold)):
        assert exact[index] == exact[representative]


@given(texts_of=st.dictionaries(st.sampled_from("abc"), st.lists(texts_that_overlap, max_size=3)), threshold=thresholds)
def test_overlap_is_that_of_all_pairs(texts_of: dict[str, list[str]], threshold: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "MIN_RECALL", 1 - 1e-9)
        patch.setattr(near_duplicates, "MAX_HASHES", 512)
        patch.setattr(near_duplicates, "MAX_FAILURES", 8)
        found = overlap(texts_of, threshold=threshold)
    assert found.total == exact_overlap(texts_of, threshold)
    assert bool(found.examples) == bool(found.total)
    for role, text, other_role, other_text in found.examples:
        assert role != other_role and text in texts_of[role] and other_text in texts_of[other_role]
        assert text == other_text or exact_similarity(text, other_text) >= threshold


@pytest.mark.parametrize(("threshold", "length", "replaced"), [(0.6, 200, 45), (0.8, 202, 18), (0.9, 424, 18)])
def test_recall_at_the_threshold_is_that_of_the_formula(threshold: float, length: int, replaced: int) -> None:
    """A run of r replaced characters exchanges r + 4 of L - 4 n-grams. Five standard deviations of 2000 draws are 0.011."""
    generator = random.Random(0)
    texts: list[str] = []
    similarities: list[float] = []
    while len(similarities) < 2000:
        text = letters(generator, length)
        changed = text[:50] + letters(generator, replaced) + text[50 + replaced :]
        if exact_similarity(text, changed) >= threshold:
            similarities.append(exact_similarity(text, changed))
            texts += [text, changed]
    mean = sum(similarities) / 2000
    assert mean < threshold + 0.005
    groups = group_near_duplicates(texts, threshold=threshold)
    assert groups[::2] == list(range(0, 4000, 2))
    recall = sum(group == index for index, group in zip(range(0, 4000, 2), groups[1::2], strict=True)) / 2000
    bands, rows = bands_and_rows(threshold)
    assert recall == pytest.approx(1 - (1 - mean**rows) ** bands, abs=0.011)
    assert recall >= 0.985


@pytest.mark.parametrize("threshold", [0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.9999, 1 - 1e-12])
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_and_rows(threshold)
    assert 1 - (1 - threshold**rows) ** bands >= 0.99 and bands * rows <= 256


def test_bands_of_the_docstring() -> None:
    bands, rows = bands_and_rows(0.8)
    assert (bands, rows) == (26, 8) and round(1 - (1 - 0.8**rows) ** bands, 4) == 0.9916


def test_group_is_named_by_its_first_text() -> None:
    texts = ["something else entirely", FOX + "!", "zebras", FOX, "zebras", FOX + "?"]
    assert group_near_duplicates(texts, threshold=0.8) == [0, 1, 2, 1, 2, 1]


def test_groups_do_not_depend_on_the_order() -> None:
    generator = random.Random(1)
    texts = [FOX[:60] + letters(generator, generator.randrange(2, 12)) for _ in range(300)]

    def partition(texts: list[str]) -> set[frozenset[str]]:
        groups = group_near_duplicates(texts, threshold=0.85)
        return {frozenset(t for t, g in zip(texts, groups, strict=True) if g == group) for group in groups}

    shuffled = generator.sample(texts, len(texts))
    assert partition(texts) == partition(shuffled)
    assert 1 < len(partition(texts)) < len(texts)


def test_chain_is_one_group() -> None:
    """Neighbors share 46 of 56 n-grams (0.82); the ends share 36 of 66 (0.55)."""
    first = LONG_PROMPT[:55]
    middle, last = LONG_PROMPT[5:60], LONG_PROMPT[10:65]
    assert group_near_duplicates([first, last], threshold=0.8) == [0, 1]
    assert group_near_duplicates([first, last, middle], threshold=0.8) == [0, 0, 0]


def test_similarity_of_exactly_the_threshold_is_enough() -> None:
    """8 n-grams, and the same with 2 more."""
    assert group_near_duplicates(["abcdefghijkl", "abcdefghijklmn"], threshold=0.8) == [0, 0]
    assert group_near_duplicates(["abcdefghijkl", "abcdefghijklmn"], threshold=0.81) == [0, 1]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_few_and_short_texts(threshold: float) -> None:
    assert group_near_duplicates([], threshold=threshold) == []
    assert group_near_duplicates([""], threshold=threshold) == [0]
    assert group_near_duplicates([FOX], threshold=threshold) == [0]
    assert group_near_duplicates(["", "a", "", "ab", "a", "abcd", "abcde", "abcd"], threshold=threshold) == [
        0, 1, 0, 3, 1, 5, 6, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("threshold", [1.0, 1.5])
def test_threshold_of_1_groups_equal_texts_without_comparing(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_signatures", None)
    assert group_near_duplicates([FOX, FOX + ".", FOX], threshold=threshold) == [0, 1, 0]
    assert overlap({"sft": [FOX], "judge": [FOX + "."]}, threshold=threshold) == Overlap(total=0, examples=())
    assert overlap({"sft": [FOX], "judge": [FOX]}, threshold=threshold).total == 2


@pytest.mark.parametrize("threshold", [0.49, 0.0, -1.0, float("nan")])
def test_low_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"at least 0\.5"):
        group_near_duplicates(["a"], threshold=threshold)


def test_chinese_and_emoji() -> None:
    chinese = "请写一篇关于海边小村庄的短篇故事村里没有人见过从远方来的船也没有人知道海的另一边有什么"
    emoji = "🚢🌊🏖️👩‍🚀🐙🎈🎉🌵🍕🚲🎲🧩🪁🪀🎯🎳" * 2
    texts = [chinese, emoji, chinese + "。", emoji + "🎈", chinese[::-1], emoji[::-1]]
    assert group_near_duplicates(texts, threshold=0.8) == [0, 1, 0, 1, 4, 5]


def test_groups_are_equal_in_every_process() -> None:
    code = """
import random
from components.rlhf.data.near_duplicates import group_near_duplicates, overlap
generator = random.Random(0)
texts = ["one template for all of the prompts: " + "".join(generator.choices("abc", k=12)) for _ in range(400)]
print(group_near_duplicates(texts, threshold=0.7), overlap({"a": texts[:200], "b": texts[200:]}, threshold=0.7))
"""
    outputs = []
    for seed in ("0", "1", "random"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]


def test_variants_of_one_template_stay_apart_with_a_bounded_number_of_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two variants share 93 of about 133 n-grams (0.70). Only the last text, one letter from another, joins a group."""
    generator = random.Random(0)
    texts = [LONG_PROMPT[:97] + letters(generator, 20) for _ in range(5000)]
    texts.append(texts[2345][:-1] + "!")
    comparisons = 0
    compare = near_duplicates.similarity

    def counted(left: frozenset[str], right: frozenset[str]) -> float:
        nonlocal comparisons
        comparisons += 1
        return compare(left, right)

    monkeypatch.setattr(near_duplicates, "similarity", counted)
    monkeypatch.setattr(near_duplicates, "MAX_FAILURES", 1)
    assert group_near_duplicates(texts, threshold=0.8) == [*range(5000), 2345]
    bands, _ = bands_and_rows(0.8)
    assert comparisons <= bands * len(texts)


def test_variants_of_one_template_join_with_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two variants share 93 of at most 107 n-grams (0.87): every comparison joins, and no later one is needed."""
    generator = random.Random(0)
    texts = sorted({LONG_PROMPT[:97] + letters(generator, 7) for _ in range(2000)})
    comparisons = []
    compare = near_duplicates.similarity
    monkeypatch.setattr(near_duplicates, "similarity", lambda *sets: comparisons.append(1) or compare(*sets))
    assert set(group_near_duplicates(texts, threshold=0.8)) == {0}
    assert len(comparisons) == len(texts) - 1


def test_overlap_counts_each_text_of_each_role_once() -> None:
    texts_of = {
        "sft": [FOX, FOX, "only here, and long enough"],
        "judge": [FOX, FOX + "!"],
        "evaluation": ["only here too, and as long as that", "ab"],
    }
    found = overlap(texts_of, threshold=0.8)
    assert found.total == 3  # FOX of sft, FOX and FOX! of judge
    assert found.examples == (("judge", FOX, "sft", FOX), ("sft", FOX, "judge", FOX + "!"))


def test_overlap_within_a_role_does_not_count() -> None:
    assert overlap({"sft": [FOX, FOX + "!"], "judge": ["zebras"]}, threshold=0.8) == Overlap(total=0, examples=())
    assert overlap({}, threshold=0.8) == Overlap(total=0, examples=())


def test_overlap_has_at_most_10_examples() -> None:
    texts = [f"prompt number {number}" for number in range(25)]
    found = overlap({"sft": texts, "judge": texts}, threshold=1.0)
    assert (found.total, len(found.examples)) == (50, 10)


def test_overlap_of_a_split_by_groups_is_nearly_none() -> None:
    """The second look uses other hash functions, so it sees what the first one missed: about 1 pair in 100 at the threshold."""
    generator = random.Random(0)
    texts = []
    for _ in range(500):
        text = letters(generator, 202)
        texts += [text, text[:50] + letters(generator, 18) + text[68:]]
    groups = group_near_duplicates(texts, threshold=0.8)
    # A pair that was joined has the even index of its first text; a missed one has two roles.
    by_group = {
        "even": [text for text, group in zip(texts, groups, strict=True) if group % 2 == 0],
        "odd": [text for text, group in zip(texts, groups, strict=True) if group % 2 == 1],
    }
    by_chance = {"even": texts[::2], "odd": texts[1::2]}
    assert 0 < overlap(by_group, threshold=0.8).total <= 20
    assert overlap(by_chance, threshold=0.8).total >= 980
