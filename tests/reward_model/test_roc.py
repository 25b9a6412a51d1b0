import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kfp.dsl import ClassificationMetrics
from sklearn.metrics import roc_curve as sklearn_roc_curve

from components.reward_model.roc import MAX_POINTS, roc_curve


def rows(margins: list[float]) -> list[tuple[float, float, float]]:
    return [(p["confidenceThreshold"], p["falsePositiveRate"], p["recall"]) for p in roc_curve(margins)]


def test_curve_by_hand() -> None:
    # Margins 2, 1, -1: in the right order 2, 1, -1, in the wrong one -2, -1, 1.
    assert rows([2.0, 1.0, -1.0]) == [
        (3.0, 0.0, 0.0),
        (2.0, 0.0, pytest.approx(1 / 3)),
        (1.0, pytest.approx(1 / 3), pytest.approx(2 / 3)),
        (-1.0, pytest.approx(2 / 3), 1.0),
        (-2.0, 1.0, 1.0),
    ]
    assert rows([0.0]) == [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0)]  # a tie tells nothing
    assert rows([]) == []


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40))
def test_curve_is_that_of_scikit_learn(margins: list[float]) -> None:
    labels, scores = [1] * len(margins) + [0] * len(margins), [*margins, *(-m for m in margins)]
    fpr, tpr, thresholds = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    found = np.array(rows(margins))
    assert found[:, 1:] == pytest.approx(np.stack([fpr, tpr], axis=1))
    assert found[1:, 0] == pytest.approx(thresholds[1:])  # whose first one is infinite, which KFP refuses


def test_long_curve_is_thinned_and_keeps_its_ends() -> None:
    curve = roc_curve(np.random.default_rng(0).normal(0.5, 1, size=3000).tolist())
    assert MAX_POINTS / 2 < len(curve) <= MAX_POINTS
    assert [(p["falsePositiveRate"], p["recall"]) for p in (curve[0], curve[-1])] == [(0.0, 0.0), (1.0, 1.0)]
    thresholds = [p["confidenceThreshold"] for p in curve]
    assert thresholds == sorted(thresholds, reverse=True)


def test_points_have_the_form_of_kfp() -> None:
    curve = roc_curve([2.0, 1.0, -1.0])
    theirs = ClassificationMetrics(name="roc", uri="", metadata={})
    theirs.log_roc_curve(
        fpr=[p["falsePositiveRate"] for p in curve],
        tpr=[p["recall"] for p in curve],
        threshold=[p["confidenceThreshold"] for p in curve],
    )
    assert theirs.metadata["confidenceMetrics"] == curve
