"""The learning rate of each step."""

import math

from components.rlhf.config.model import TrainingConfig


def learning_rate_at(step: int, training: TrainingConfig, *, peak: float, num_steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up to the peak, then constant, linear or cosine to the floor."""
    warmup = math.ceil(training.warmup_fraction * num_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    floor = training.min_learning_rate_fraction
    progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    match training.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - progress * (1 - floor)
        case "cosine":
            share = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return peak * share
