from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.data.pairs import cap_per_prompt, pairs_from_ratings, pairs_per_prompt
from components.rlhf.data.records import PreferencePair, RatedText


def rated(text: str, rating: float) -> RatedText:
    """Prompt and completion split after the first word; pairing must not depend on the split."""
    first, *rest = text.split()
    return RatedText(prompt=first, completion=" " + " ".join(rest), rating=rating)


def pair(prompt: str, chosen: str = "c", rejected: str = "r") -> PreferencePair:
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)


# --- from ratings ---


def test_pair_from_two_ratings() -> None:
    texts = [rated("a film so dull that I slept", -2.0), rated("a film so bright", 1.5)]
    assert pairs_from_ratings(texts, min_gap=1.0, seed=0) == [
        PreferencePair(prompt="a film so", chosen=" bright", rejected=" dull that I slept", margin=3.5)
    ]


def test_partner_has_longest_common_prefix() -> None:
    texts = [rated(f"a {word} {end}", rating) for word in "bc" for end, rating in (("good", 2.0), ("bad", -1.0))]
    pairs = {(p.prompt, p.chosen, p.rejected) for p in pairs_from_ratings(texts, min_gap=1.0, seed=0)}
    assert pairs == {("a b", " good", " bad"), ("a c", " good", " bad")}


def test_two_texts_can_have_the_same_partner() -> None:
    texts = [rated("a b c good", 2.0), rated("a b x bad", -1.0), rated("a y bad", -1.0)]
    by_prompt = {p.prompt: (p.chosen, p.rejected) for p in pairs_from_ratings(texts, min_gap=1.0, seed=0)}
    assert by_prompt == {"a b": (" c good", " x bad"), "a": (" b c good", " y bad")}


def test_gap_of_exactly_min_gap_forms_a_pair() -> None:
    texts = [rated("a b", 0.0), rated("a c", 1.0)]
    assert len(pairs_from_ratings(texts, min_gap=1.0, seed=0)) == 1
    assert pairs_from_ratings(texts, min_gap=1.001, seed=0) == []


def test_texts_without_a_shared_first_word_form_no_pair() -> None:
    assert pairs_from_ratings([rated("a b", 0.0), rated("c b", 4.0)], min_gap=1.0, seed=0) == []
    assert pairs_from_ratings([rated("a b", 0.0)], min_gap=0.0, seed=0) == []
    assert pairs_from_ratings([], min_gap=1.0, seed=0) == []


def test_text_that_is_a_prefix_of_another_keeps_a_completion() -> None:
    got = pairs_from_ratings([rated("a b c", 2.0), rated("a b c d e", 0.0)], min_gap=1.0, seed=0)
    assert [(p.prompt, p.chosen, p.rejected) for p in got] == [("a b", " c", " c d e")]


def test_pairs_depend_on_seed() -> None:
    texts = [rated(f"a w{number}", float(number)) for number in range(30)]
    assert pairs_from_ratings(texts, min_gap=1.0, seed=1) == pairs_from_ratings(texts, min_gap=1.0, seed=1)
    assert pairs_from_ratings(texts, min_gap=1.0, seed=1) != pairs_from_ratings(texts, min_gap=1.0, seed=2)


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=5)
TEXTS = st.lists(st.tuples(WORDS, st.integers(-4, 4)), max_size=12, unique_by=lambda text: tuple(text[0]))


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 3))
def test_invariants_of_pairs(texts: list[tuple[list[str], int]], min_gap: float, seed: int) -> None:
    rating_of = {" ".join(words): rating for words, rating in texts}
    pairs = pairs_from_ratings([rated(text, rating) for text, rating in rating_of.items()], min_gap=min_gap, seed=seed)
    for pair in pairs:
        chosen, rejected = pair.prompt + pair.chosen, pair.prompt + pair.rejected
        # Both are rated texts; the rating of chosen is higher by the margin, which is at least min_gap.
        assert pair.margin == rating_of[chosen] - rating_of[rejected]
        assert pair.margin >= min_gap
        # The prompt is the common prefix, but both completions have at least one word.
        assert pair.prompt and pair.chosen.strip() and pair.rejected.strip()
        shortest = min(len(chosen.split()), len(rejected.split()))
        first_differ = pair.chosen.split()[0] != pair.rejected.split()[0]
        assert first_differ or len(pair.prompt.split()) == shortest - 1
    assert len({(p.prompt, p.chosen, p.rejected) for p in pairs}) == len(pairs)
    # Every text with a possible partner is in a pair.
    paired = {p.prompt + text for p in pairs for text in (p.chosen, p.rejected)}
    for words, rating in texts:
        if any(other[0] == words[0] and abs(value - rating) >= min_gap for other, value in texts):
            assert " ".join(words) in paired


# --- cap_per_prompt ---


def test_cap_per_prompt() -> None:
    pairs = [pair("p", chosen=str(number)) for number in range(5)] + [pair("q"), pair("q", "d")]
    kept = cap_per_prompt(pairs, 3, seed=0)
    assert Counter(p.prompt for p in kept) == {"p": 3, "q": 2}
    assert len(set(kept)) == 5 and set(kept) <= set(pairs)


def test_cap_is_independent_of_file_order() -> None:
    pairs = [pair("p", chosen=str(number)) for number in range(100)]
    kept = [int(p.chosen) for p in cap_per_prompt(pairs, 10, seed=0)]
    assert max(kept) >= 50
    assert kept != sorted(kept)
    assert kept == [int(p.chosen) for p in cap_per_prompt(pairs, 10, seed=0)]
    assert kept != [int(p.chosen) for p in cap_per_prompt(pairs, 10, seed=1)]


# --- several rated answers to a prompt ---


def answer(text: str, rating: float, prompt: str = "p") -> RatedText:
    return RatedText(prompt=prompt, completion=text, rating=rating)


def test_every_two_answers_to_a_prompt_that_differ_enough_form_a_pair() -> None:
    pairs = pairs_per_prompt([answer("a", 3), answer("b", 1), answer("c", 2.5), answer("z", 9, "q")], min_gap=1, seed=0)
    assert {(p.prompt, p.chosen, p.rejected, p.margin) for p in pairs} == {("p", "a", "b", 2.0), ("p", "c", "b", 1.5)}


def test_labels_form_pairs_of_good_and_bad_answers() -> None:
    pairs = pairs_per_prompt([answer("good", 1), answer("bad", 0), answer("fine", 1)], min_gap=1, seed=0)
    assert {(p.chosen, p.rejected) for p in pairs} == {("good", "bad"), ("fine", "bad")}


def test_equal_ratings_and_equal_texts_form_no_pair() -> None:
    assert pairs_per_prompt([answer("a", 1), answer("b", 1), answer("a", 3)], min_gap=0, seed=0) == [
        PreferencePair(prompt="p", chosen="a", rejected="b", margin=2.0)
    ]


def test_number_of_pairs_of_one_prompt_is_bounded() -> None:
    pairs = pairs_per_prompt([answer(str(n), n) for n in range(3000)], min_gap=1, seed=0)
    assert len(pairs) == 100 * 99 / 2
