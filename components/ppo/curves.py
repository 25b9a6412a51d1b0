"""The metrics of a run as a self-contained HTML page of small plots, without scripts or network access."""

import html
import io
import re
from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from components.rlhf.config.ppo import PpoConfig

Row = dict[str, float]
PANELS = (
    ("score/mean", "reward model score (mean of the rollout)"),
    ("kl/sequence", "KL to SFT (nats per response)"),
    ("entropy", "entropy (nats per token)"),
    ("response/length", "response length (tokens)"),
    ("response/eos_rate", "EOS rate"),
    ("actor/clip_fraction", "clip fraction"),
    ("loss/value", "value loss"),
    ("value/explained_variance", "explained variance of the critic"),
    ("actor/grad_norm", "actor gradient norm"),
)


def as_svg(history: Sequence[Row]) -> str:
    """All panels over the iterations, as inline SVG."""
    figure, axes = plt.subplots(3, 3, figsize=(12, 7.5), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        axis.plot([row["iteration"] for row in history], [row[name] for row in history], color="#2563eb", linewidth=1.6)
        evals = [row for row in history if f"validation/{name}" in row]
        if evals:
            xs, ys = [row["iteration"] for row in evals], [row[f"validation/{name}"] for row in evals]
            axis.plot(xs, ys, "o", color="#f97316", markersize=4, label="validation prompts")
            axis.legend(fontsize=7, frameon=False)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("iteration", fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)


def as_html(history: Sequence[Row], ppo: PpoConfig) -> str:
    last = history[-1]
    facts = (
        f"{len(history)} iterations of {ppo.rollout.num_prompts * ppo.rollout.samples_per_prompt} responses; "
        f"score {history[0]['score/mean']:.2f} to {last['score/mean']:.2f}, KL {last['kl/sequence']:.2f} nats per response, "
        f"KL coefficient {last['kl/coef']:.3g}."
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>PPO</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}"
        "svg{width:100%;height:auto}</style>"
        f"<h1>PPO</h1><p>{html.escape(facts)}</p>{as_svg(history)}"
        "<p>components/ppo/README.md explains each metric and how a healthy run looks.</p></html>"
    )
