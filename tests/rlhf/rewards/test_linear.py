import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from components.rlhf.data.records import Completion, PreferencePair, Prompt, RatedText
from components.rlhf.rewards.linear import LinearJudge, fit_to_pairs, fit_to_ratings, load_judge

GOOD = ["great fun", "a great film", "wonderful and great", "truly wonderful", "fun for all"]
BAD = ["dull and bad", "a bad film", "truly awful", "awful and dull", "bad for all"]
RATED = [RatedText(prompt="It is ", completion=text, rating=2.0) for text in GOOD] + [
    RatedText(prompt="It is ", completion=text, rating=-2.0) for text in BAD
]
PAIRS = [PreferencePair(prompt="It is ", chosen=good, rejected=bad) for good in GOOD for bad in BAD]
NEW = ["It is great", "It is bad", "It is naïve 😀", "", "It is a wonderful film, great fun", "unknown words"]


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


@pytest.fixture(params=["ratings", "pairs"])
def judge(request: pytest.FixtureRequest) -> LinearJudge:
    options = {"max_ngram": 2, "regularisation": 1.0}
    return fit_to_ratings(RATED, **options) if request.param == "ratings" else fit_to_pairs(PAIRS, **options)


def test_preferred_words_score_higher(judge: LinearJudge) -> None:
    great, bad, *_ = judge.score_texts(NEW).tolist()
    assert great > bad
    good, poor = (judge.score_texts([f"It is {text}" for text in texts]) for texts in (GOOD, BAD))
    assert good.min() > poor.max()


def test_fit_is_deterministic() -> None:
    for fit, data in ((fit_to_ratings, RATED), (fit_to_pairs, PAIRS)):
        a, b = (fit(data, max_ngram=2, regularisation=1.0).coefficients for _ in range(2))
        assert np.array_equal(a, b)


def test_more_regularisation_means_smaller_coefficients() -> None:
    for fit, data in ((fit_to_ratings, RATED), (fit_to_pairs, PAIRS)):
        loose, tight = (np.abs(fit(data, max_ngram=1, regularisation=r).coefficients).max() for r in (0.1, 10.0))
        assert tight < loose / 2


def test_features_are_ngrams_up_to_max_ngram() -> None:
    terms = {n: set(fit_to_ratings(RATED, max_ngram=n, regularisation=1.0).vectorizer.vocabulary_) for n in (1, 2)}
    assert {len(term.split()) for term in terms[1]} == {1}
    assert {len(term.split()) for term in terms[2]} == {1, 2}
    assert "great film" in terms[2]


def test_constant_rating_is_the_score_of_every_text() -> None:
    rated = [RatedText(prompt="", completion=text, rating=1.25) for text in GOOD]
    judge = fit_to_ratings(rated, max_ngram=1, regularisation=1.0)
    assert judge.score_texts(NEW).tolist() == pytest.approx([1.25] * len(NEW), abs=1e-6)


def test_swapped_pairs_give_the_opposite_judge() -> None:
    judge = fit_to_pairs(PAIRS, max_ngram=2, regularisation=1.0)
    opposite = fit_to_pairs(swapped(PAIRS), max_ngram=2, regularisation=1.0)
    assert opposite.coefficients == pytest.approx(-judge.coefficients, abs=1e-4)
    assert np.abs(judge.coefficients).max() > 0.1


def test_contradictory_pairs_give_zero_coefficients() -> None:
    judge = fit_to_pairs(PAIRS + swapped(PAIRS), max_ngram=1, regularisation=1.0)
    assert judge.coefficients == pytest.approx(np.zeros_like(judge.coefficients), abs=1e-3)


def test_fit_to_pairs_is_the_bradley_terry_optimum() -> None:
    """At the minimum of sum log(1 + exp(-w.d)) + |w|^2 / 2 the gradient vanishes."""
    judge = fit_to_pairs(PAIRS, max_ngram=1, regularisation=1.0)
    chosen = judge.vectorizer.transform([p.prompt + p.chosen for p in PAIRS]).toarray()
    rejected = judge.vectorizer.transform([p.prompt + p.rejected for p in PAIRS]).toarray()
    difference = chosen - rejected
    slope = -1 / (1 + np.exp(difference @ judge.coefficients))
    gradient = (slope[:, None] * difference).sum(axis=0) + judge.coefficients
    assert np.abs(gradient).max() < 1e-2


def test_words_in_both_texts_have_small_coefficients() -> None:
    judge = fit_to_pairs(PAIRS, max_ngram=1, regularisation=1.0)
    terms = judge.vectorizer.vocabulary_
    assert abs(judge.coefficients[terms["it"]]) < abs(judge.coefficients[terms["great"]]) / 3


def test_hand_computed_score() -> None:
    """Two texts "aa bb" and "bb cc": idf = ln((1 + n) / (1 + df)) + 1; counts as 1 + ln count; rows of length 1."""
    rated = [
        RatedText(prompt="aa ", completion="bb", rating=1.0),
        RatedText(prompt="bb ", completion="cc", rating=-1.0),
    ]
    judge = fit_to_ratings(rated, max_ngram=1, regularisation=1.0)
    assert sorted(judge.vectorizer.vocabulary_) == ["aa", "bb", "cc"]
    rare, common = math.log(3 / 2) + 1, math.log(3 / 3) + 1
    weights = np.array([(1 + math.log(3)) * rare, common, 0.0])  # the text "aa aa aa bb"
    expected = weights / np.linalg.norm(weights) @ judge.coefficients + judge.intercept
    assert judge.score_texts(["aa aa aa bb"]).item() == pytest.approx(expected, abs=1e-6)


def test_completion_is_scored_with_its_prompt(judge: LinearJudge) -> None:
    scores = judge.score([completion("It is ", "great"), completion("It is g", "reat"), completion("", "It is great")])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [scores[0].item()] * 3


def test_score_does_not_depend_on_the_other_texts(judge: LinearJudge) -> None:
    together = judge.score_texts(NEW).tolist()
    assert [judge.score_texts([text]).item() for text in NEW] == pytest.approx(together, abs=1e-6)


def test_loaded_judge_gives_identical_scores(judge: LinearJudge, tmp_path: Path) -> None:
    judge.save(tmp_path)
    texts = NEW + [f"It is {text}" for text in GOOD + BAD]
    assert torch.equal(load_judge(tmp_path).score_texts(texts), judge.score_texts(texts))


def test_saved_judge_contains_only_json_and_safetensors(judge: LinearJudge, tmp_path: Path) -> None:
    judge.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["judge.json", "judge.safetensors"]
    content = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    assert content["max_ngram"] == 2
    assert sorted(content["vocabulary"].values()) == list(range(len(judge.coefficients)))


def test_saved_judge_supports_all_scripts(tmp_path: Path) -> None:
    rated = [
        RatedText(prompt="", completion="très naïve 映画", rating=1.0),
        RatedText(prompt="", completion="да", rating=0.0),
    ]
    judge = fit_to_ratings(rated, max_ngram=2, regularisation=1.0)
    judge.save(tmp_path)
    loaded = load_judge(tmp_path)
    assert loaded.vectorizer.vocabulary_ == judge.vectorizer.vocabulary_
    assert torch.equal(loaded.score_texts(["naïve 映画"]), judge.score_texts(["naïve 映画"]))
