"""Floating point operations of the work itself, without padding: multiplications and additions of matrix products.

A backward pass costs twice its forward pass where weights are trained, and once where only inputs need gradients.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Lengths = Sequence[Sequence[int]]  # [prompt tokens, response tokens] of each row


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama that decide its cost."""

    hidden: int
    intermediate: int
    layers: int
    key_value: int  # width of all keys of one token
    vocabulary: int

    @classmethod
    def of(cls, folder: Path) -> "Shape":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            key_value=head * config["num_key_value_heads"],
            vocabulary=config["vocab_size"],
        )

    def layer_forward(self, length: int) -> float:
        """One row of this length through one layer; attention is causal."""
        weights = self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.intermediate)
        return 2.0 * weights * length + 2.0 * self.hidden * length**2

    def head_forward(self, positions: int) -> float:
        return 2.0 * self.hidden * self.vocabulary * positions


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one iteration of PPO does with its rows."""

    epochs: int = 1
    frozen: int = 0  # layers that all models share, passed once per rollout
    trains_critic_layers: bool = True
    generates: bool = True


def ppo_flops(shape: Shape, lengths: Lengths, work: Work) -> float:
    """Generation, scoring with all four models and the updates of one iteration."""
    rows = [prompt + response for prompt, response in lengths]
    layer = sum(shape.layer_forward(length) for length in rows)
    head = sum(shape.head_forward(response) for _, response in lengths)
    trained = shape.layers - work.frozen
    generation = shape.layers * layer + head if work.generates else 0.0
    trunk = work.frozen * layer
    # The reference with its head, and the reward model; a critic without layers of its own reads the reward model's. The log-probs of
    # the actor are those of generation.
    models = 3 if work.trains_critic_layers else 2
    score = trunk + models * trained * layer + head
    # The embeddings, which are the head too, are frozen together with layers: no gradient of the head's weights then.
    update = 3 * trained * layer + (2 if work.frozen else 3) * head
    if work.trains_critic_layers:
        update += 3 * trained * layer
    return generation + score + work.epochs * update
