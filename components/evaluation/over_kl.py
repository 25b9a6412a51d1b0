"""A picture for MLflow: what training did to the reward and to the judge's score, over the distance from the SFT model."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

SCORES = (
    ("reward", "reward, which PPO maximizes", "#2563eb"),
    ("judge_score", "judge, which PPO never sees", "#f97316"),
)


def reward_and_judge_over_kl(training: Sequence[Mapping[str, float]]) -> str:
    """Mean scores of PPO's validation passes over their KL as SVG, a point for each; "" with fewer than two passes.

    Over-optimization of the reward looks like this: the reward still rises with the KL where the judge's score falls (Gao et al. 2022).
    """
    panels = [panel for panel in SCORES if all(panel[0] in row for row in training)]
    if len(training) < 2 or not panels:
        return ""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), constrained_layout=True, squeeze=False)
    for axis, (name, title, color) in zip(axes.flat, panels, strict=True):
        points = [(row["kl"], row[name]) for row in training]
        axis.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, linewidth=1.2)
        for row, point in ((training[0], points[0]), (training[-1], points[-1])):
            axis.annotate(
                f"iteration {row['iteration']:.0f}", point, fontsize=8, xytext=(4, 4), textcoords="offset points"
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("KL to SFT, nats per response", fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
