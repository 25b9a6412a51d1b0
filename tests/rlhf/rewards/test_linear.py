import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from components.rlhf.config.judge import LinearJudge as LinearConfig
from components.rlhf.data.records import Completion, PreferencePair, Prompt, RatedText
from components.rlhf.rewards.linear import (
    LinearJudge,
    fit_linear_judge,
    fit_to_pairs,
    fit_to_ratings,
    load_linear_judge,
)

GOOD = ["great fun", "a great film", "wonderful and great", "truly wonderful", "fun for all"]
BAD = ["dull and bad", "a bad film", "truly awful", "awful and dull", "bad for all"]
RATED = [RatedText(prompt="It is ", completion=text, rating=2.0) for text in GOOD] + [
    RatedText(prompt="It is ", completion=text, rating=-2.0) for text in BAD
]
PAIRS = [PreferencePair(prompt="It is ", chosen=good, rejected=bad) for good in GOOD for bad in BAD]
NEW = ["It is great", "It is bad", "It is naïve 😀", "", "It is a wonderful film, great fun", "unknown words"]
ANALYZERS = {"words": ["words"], "characters": ["characters"], "both": ["words", "characters"]}
each_features = pytest.mark.parametrize("features", list(ANALYZERS))


def completion(prompt: str, response: str) -> Completion:
    return Completion(
        prompt=Prompt(prompt=prompt),
        prompt_ids=[1],
        response_ids=[2],
        response=response,
        logprobs=None,
        truncated=False,
    )


def swapped(pairs: list[PreferencePair]) -> list[PreferencePair]:
    return [PreferencePair(prompt=p.prompt, chosen=p.rejected, rejected=p.chosen) for p in pairs]


def coefficient_of(judge: LinearJudge, term: str) -> float:
    return float(judge.coefficients[judge.terms.index(term)])


@pytest.fixture(params=list(ANALYZERS))
def features(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["ratings", "pairs"])
def judge(request: pytest.FixtureRequest, features: str) -> LinearJudge:
    config = LinearConfig(features=features)
    return fit_to_ratings(RATED, config) if request.param == "ratings" else fit_to_pairs(PAIRS, config)


def test_preferred_words_score_higher(judge: LinearJudge) -> None:
    great, bad, *_ = judge.score_texts(NEW).tolist()
    assert great > bad
    good, poor = (judge.score_texts([f"It is {text}" for text in texts]) for texts in (GOOD, BAD))
    assert good.min() > poor.max()


def test_the_features_are_those_of_the_setting(judge: LinearJudge, features: str) -> None:
    assert list(judge.vectorizers) == ANALYZERS[features]
    assert len(judge.terms) == len(judge.coefficients)


@each_features
def test_fit_is_deterministic(features: str) -> None:
    for fit, data in ((fit_to_ratings, RATED), (fit_to_pairs, PAIRS)):
        a, b = (fit(data, LinearConfig(features=features)).coefficients for _ in range(2))
        assert np.array_equal(a, b)


@each_features
def test_more_regularisation_means_smaller_coefficients(features: str) -> None:
    for fit, data in ((fit_to_ratings, RATED), (fit_to_pairs, PAIRS)):
        loose, tight = (
            np.abs(fit(data, LinearConfig(features=features, regularisation=r)).coefficients).max() for r in (0.1, 10.0)
        )
        assert tight < loose / 2


def test_features_are_ngrams_of_words_up_to_max_ngram() -> None:
    terms = {n: fit_to_ratings(RATED, LinearConfig(features="words", max_ngram=n)).terms for n in (1, 2)}
    assert {len(term.split()) for term in terms[1]} == {1}
    assert {len(term.split()) for term in terms[2]} == {1, 2}
    assert "great film" in terms[2]


def test_features_are_ngrams_of_characters_up_to_max_character_ngram() -> None:
    terms = {n: fit_to_ratings(RATED, LinearConfig(features="characters", max_character_ngram=n)).terms for n in (1, 3)}
    assert {len(term) for term in terms[1]} == {1}
    assert {len(term) for term in terms[3]} == {1, 2, 3}
    assert {"gre", "t f", "ful"} <= set(terms[3])


def test_with_both_features_the_terms_are_those_of_words_and_then_those_of_characters() -> None:
    words, characters, both = (fit_to_ratings(RATED, LinearConfig(features=features)).terms for features in ANALYZERS)
    assert both == words + characters


def test_words_of_one_letter_and_punctuation_are_terms() -> None:
    rated = [RatedText(prompt="", completion=text, rating=rating) for text, rating in (("A!", 1.0), ("b, 7?", -1.0))]
    judge = fit_to_ratings(rated, LinearConfig(features="words", max_ngram=1))
    assert sorted(judge.terms) == sorted(["a", "!", "b", ",", "7", "?"])
    better, worse = judge.score_texts(["A", "B"]).tolist()
    assert better > 0.1 and worse < -0.1


@each_features
def test_constant_rating_is_the_score_of_every_text(features: str) -> None:
    rated = [RatedText(prompt="", completion=text, rating=1.25) for text in GOOD]
    judge = fit_to_ratings(rated, LinearConfig(features=features))
    assert judge.score_texts(NEW).tolist() == pytest.approx([1.25] * len(NEW), abs=1e-6)


@each_features
def test_swapped_pairs_give_the_opposite_judge(features: str) -> None:
    judge, opposite = (fit_to_pairs(pairs, LinearConfig(features=features)) for pairs in (PAIRS, swapped(PAIRS)))
    assert opposite.terms == judge.terms
    assert opposite.coefficients == pytest.approx(-judge.coefficients, abs=1e-4)
    assert np.abs(judge.coefficients).max() > 0.1


@each_features
def test_contradictory_pairs_give_zero_coefficients(features: str) -> None:
    judge = fit_to_pairs(PAIRS + swapped(PAIRS), LinearConfig(features=features))
    assert judge.coefficients == pytest.approx(np.zeros_like(judge.coefficients), abs=1e-3)


@each_features
@pytest.mark.parametrize("regularisation", [0.3, 1.0, 5.0])
def test_fit_to_pairs_is_the_bradley_terry_optimum(features: str, regularisation: float) -> None:
    """At the minimum of sum log(1 + exp(-w.d)) + regularisation |w|^2 / 2 the gradient vanishes."""
    judge = fit_to_pairs(PAIRS, LinearConfig(features=features, regularisation=regularisation))
    chosen, rejected = (
        np.hstack(
            [v.transform([p.prompt + getattr(p, side) for p in PAIRS]).toarray() for v in judge.vectorizers.values()]
        )
        for side in ("chosen", "rejected")
    )
    difference = chosen - rejected
    slope = -1 / (1 + np.exp(difference @ judge.coefficients))
    gradient = (slope[:, None] * difference).sum(axis=0) + regularisation * judge.coefficients
    assert np.abs(gradient).max() < 1e-2
    assert judge.intercept == 0.0


def test_words_in_both_texts_have_small_coefficients() -> None:
    judge = fit_to_pairs(PAIRS, LinearConfig(features="words", max_ngram=1))
    assert abs(coefficient_of(judge, "it")) < abs(coefficient_of(judge, "great")) / 3


def test_hand_computed_score() -> None:
    """Two texts "aa bb" and "bb cc": idf = ln((1 + n) / (1 + df)) + 1; counts as 1 + ln count; rows of length 1."""
    rated = [
        RatedText(prompt="aa ", completion="bb", rating=1.0),
        RatedText(prompt="bb ", completion="cc", rating=-1.0),
    ]
    judge = fit_to_ratings(rated, LinearConfig(features="words", max_ngram=1))
    assert judge.terms == ["aa", "bb", "cc"]
    rare, common = math.log(3 / 2) + 1, math.log(3 / 3) + 1
    weights = np.array([(1 + math.log(3)) * rare, common, 0.0])  # the text "aa aa aa bb"
    expected = weights / np.linalg.norm(weights) @ judge.coefficients + judge.intercept
    assert judge.score_texts(["aa aa aa bb"]).item() == pytest.approx(expected, abs=1e-6)


def test_hand_computed_score_of_both_features() -> None:
    """Two texts "a" and "b": each is one word and one character, both of weight 1, so the score is the sum of two."""
    rated = [RatedText(prompt="", completion=text, rating=rating) for text, rating in (("a", 1.0), ("b", -1.0))]
    judge = fit_to_ratings(rated, LinearConfig(features="both"))
    assert judge.terms == ["a", "b", "a", "b"]
    # Ridge regression of y = (1, -1) on centred features (+-1/2, 4 columns): w = (+, -, +, -) / 2 by symmetry with
    # the minimum of 2 (1 - 2 w)^2 + 4 w^2, so 12 w = 4; hence w = 1/3 and the score is 2 w.
    assert judge.coefficients == pytest.approx([1 / 3, -1 / 3, 1 / 3, -1 / 3], abs=1e-6)
    assert judge.score_texts(["A", "b", "c"]).tolist() == pytest.approx([2 / 3, -2 / 3, 0.0], abs=1e-6)


def test_completion_is_scored_with_its_prompt(judge: LinearJudge) -> None:
    scores = judge.score([completion("It is ", "great"), completion("It is g", "reat"), completion("", "It is great")])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [scores[0].item()] * 3


def test_score_does_not_depend_on_the_other_texts(judge: LinearJudge) -> None:
    together = judge.score_texts(NEW).tolist()
    assert [judge.score_texts([text]).item() for text in NEW] == pytest.approx(together, abs=1e-6)


def test_no_texts_have_no_scores(judge: LinearJudge) -> None:
    assert judge.score_texts([]).shape == (0,)
    assert judge.score([]).shape == (0,)


def test_ratings_are_preferred_to_pairs() -> None:
    """The pairs say the opposite of the ratings, and only the ratings count."""
    config = LinearConfig(features="words")
    both, quality = fit_linear_judge(config, RATED, swapped(PAIRS), seed=1)
    assert np.array_equal(both.coefficients, fit_to_ratings(RATED, config).coefficients)
    from_pairs, _ = fit_linear_judge(config, [], swapped(PAIRS), seed=1)
    assert np.array_equal(from_pairs.coefficients, fit_to_pairs(swapped(PAIRS), config).coefficients)
    assert quality == {}


def test_loaded_judge_gives_identical_scores(judge: LinearJudge, tmp_path: Path) -> None:
    judge.save(tmp_path)
    texts = NEW + [f"It is {text}" for text in GOOD + BAD]
    loaded = load_linear_judge(tmp_path)
    assert loaded.terms == judge.terms
    assert torch.equal(loaded.score_texts(texts), judge.score_texts(texts))


def test_saved_judge_contains_only_json_and_safetensors(judge: LinearJudge, features: str, tmp_path: Path) -> None:
    judge.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["judge.json", "judge.safetensors"]
    vocabularies = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))["vocabularies"]
    longest = {"words": 2, "characters": 4}
    assert [(v["analyzer"], v["max_ngram"]) for v in vocabularies] == [(a, longest[a]) for a in ANALYZERS[features]]
    terms = [sorted(v["terms"], key=v["terms"].__getitem__) for v in vocabularies]
    assert sum(terms, []) == judge.terms
    for vocabulary in vocabularies:
        assert sorted(vocabulary["terms"].values()) == list(range(len(vocabulary["terms"])))


@each_features
def test_saved_judge_supports_all_scripts(features: str, tmp_path: Path) -> None:
    texts = ["très naïve 映画", "да", "ดีมาก", "مَرْحَبًا", "हिन्दी", "👍🏽👨‍👩‍👧", "x = {'a': 1}\n", "\x00\u2028"]
    rated = [RatedText(prompt="", completion=text, rating=float(i)) for i, text in enumerate(texts)]
    judge = fit_to_ratings(rated, LinearConfig(features=features))
    judge.save(tmp_path)
    loaded = load_linear_judge(tmp_path)
    assert loaded.terms == judge.terms
    assert torch.equal(loaded.score_texts(texts), judge.score_texts(texts))
    assert torch.isfinite(judge.score_texts(texts)).all() and len(set(judge.score_texts(texts).tolist())) == len(texts)
