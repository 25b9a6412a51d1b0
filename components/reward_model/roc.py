"""The ROC curve of a reward model on held-out pairs, in the form that Kubeflow Pipelines draws (ClassificationMetrics)."""

from collections.abc import Sequence

MAX_POINTS = 100  # KFP keeps the curve in the metadata of an artifact
Point = dict[str, float]


def roc_curve(margins: Sequence[float]) -> list[Point]:
    """The curve of the classifier that takes a pair to be in the right order if its margin is at least a threshold.

    margins are the scores of the chosen minus those of the rejected texts. Each pair counts twice: in the right order with its margin, and
    in the wrong one with the negative. At a threshold just above 0 the recall is the accuracy without ties. The points go from (0, 0) to
    (1, 1) by falling thresholds, all of them finite; of many thresholds, evenly spaced ones are kept. Without pairs there is no curve.
    """
    if not margins:
        return []
    values = sorted({value for margin in margins for value in (margin, -margin)}, reverse=True)
    step = -(-len(values) // (MAX_POINTS - 2))
    thresholds = [values[0] + 1.0, *values[:-1:step], values[-1]]
    return [
        {
            "confidenceThreshold": threshold,
            "recall": sum(margin >= threshold for margin in margins) / len(margins),
            "falsePositiveRate": sum(-margin >= threshold for margin in margins) / len(margins),
        }
        for threshold in thresholds
    ]
