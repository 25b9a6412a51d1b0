"""A reference that follows the actor, so that the KL penalty limits each stretch of training and not the whole of it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from components.rlhf.config.ppo import ReferenceConfig
from components.rlhf.engine.protocol import TrainEngine
from components.rlhf.models.actor import Actor


class MovingReference:
    """Every update_every iterations the reference becomes decay x reference + (1 - decay) x actor (Gorbatovski et al. 2024, TR-DPO).

    Implements Saved: it is part of every checkpoint.
    """

    def __init__(self, reference: Actor, actor: TrainEngine, config: ReferenceConfig, *, rank: int) -> None:
        self.actor, self.config, self.rank = actor, config, rank
        trained = {name for name, p in actor.module.named_parameters() if p.requires_grad}
        self.weights = {name: p for name, p in reference.named_parameters() if name in trained}
        # In bf16 the small differences between reference and actor would be rounded away.
        self.averages = {name: p.detach().float() for name, p in self.weights.items()} if config.decay else {}

    @torch.no_grad()
    def follow(self, iteration: int) -> None:
        """Move the reference if it is time. Every rank calls it after each iteration (from 1)."""
        if not self.config.update_every or iteration % self.config.update_every:
            return
        for name, weight in self.actor.full_weights():
            if name not in self.weights:
                continue
            if self.averages:
                weight = self.averages[name].lerp_(weight.float(), 1 - self.config.decay)
            self.weights[name].copy_(weight)

    def snapshot(self, *, moments: bool = True) -> dict[str, Tensor]:
        if self.rank > 0:
            return {}
        source = self.averages or self.weights
        return {name: value.detach().to("cpu", copy=True) for name, value in source.items()}

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        saved = load_file(directory / "engine-00000.safetensors")
        for name, value in saved.items():
            self.weights[name].copy_(value)
            if self.averages:
                self.averages[name].copy_(value)
