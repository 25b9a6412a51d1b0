import numpy as np

from components.judge.fit import as_markdown, fit
from components.rlhf.config.judge import JudgeConfig
from components.rlhf.data.records import PreferencePair, RatedText
from components.rlhf.rewards.linear import fit_to_pairs, fit_to_ratings

RATED = [
    RatedText(prompt="A ", completion="great film", rating=3.0),
    RatedText(prompt="A ", completion="dull film", rating=-3.0),
    RatedText(prompt="A ", completion="film", rating=0.0),
]
PAIRS = [
    PreferencePair(prompt="A ", chosen="dull film", rejected="great film"),
    PreferencePair(prompt="A ", chosen="dull day", rejected="great day"),
]
SETTINGS = JudgeConfig(max_ngram=1, regularisation=0.5)


def test_ratings_are_preferred_to_pairs() -> None:
    expected = fit_to_ratings(RATED, max_ngram=1, regularisation=0.5)
    judge = fit(SETTINGS, RATED, PAIRS)
    assert np.array_equal(judge.coefficients, expected.coefficients)
    assert judge.intercept == expected.intercept


def test_without_ratings_the_pairs_serve() -> None:
    judge = fit(SETTINGS, [], PAIRS)
    assert np.array_equal(judge.coefficients, fit_to_pairs(PAIRS, max_ngram=1, regularisation=0.5).coefficients)
    dull, great = judge.score_texts(["dull", "great"])
    assert dull > great


def test_the_summary_names_the_words_it_goes_by() -> None:
    judge = fit(SETTINGS, RATED, [])
    text = as_markdown({"num_features": 3.0, "num_heldout_pairs": 7.0, "heldout_accuracy": 0.625}, judge)
    assert "3 word n-grams" in text
    assert "7 held-out pairs" in text
    assert "**62.5%**" in text
    assert "raise its score most: great, " in text
    assert "lower it most: dull, " in text
