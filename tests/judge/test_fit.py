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
CONFIG = JudgeConfig(max_ngram=1, regularisation=0.5)


def test_fit_uses_ratings_if_there_are_any() -> None:
    expected = fit_to_ratings(RATED, max_ngram=1, regularisation=0.5)
    judge = fit(CONFIG, RATED, PAIRS)
    assert np.array_equal(judge.coefficients, expected.coefficients)
    assert judge.intercept == expected.intercept


def test_fit_uses_pairs_without_ratings() -> None:
    judge = fit(CONFIG, [], PAIRS)
    assert np.array_equal(judge.coefficients, fit_to_pairs(PAIRS, max_ngram=1, regularisation=0.5).coefficients)
    dull, great = judge.score_texts(["dull", "great"])
    assert dull > great


def test_summary_lists_words_with_largest_weights() -> None:
    judge = fit(CONFIG, RATED, [])
    text = as_markdown({"num_features": 3.0, "num_heldout_pairs": 7.0, "heldout_accuracy": 0.625}, judge)
    assert "3 word n-grams" in text
    assert "7 held-out pairs" in text
    assert "**62.5%**" in text
    assert "Most positive words: great, " in text
    assert "Most negative words: dull, " in text
