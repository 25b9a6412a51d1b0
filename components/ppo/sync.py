"""Sending the actor's weights to the rollout engine, and checking that it samples from them."""

import torch

from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.data.batching import collate
from components.rlhf.engine.protocol import TrainEngine
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.rollout.probe import SyncCheck, probe_ids
from components.rlhf.rollout.protocol import RolloutEngine


class WeightSync:
    """From an actor and its engine to a rollout engine. Every rank calls each method."""

    def __init__(self, config: PpoStageConfig, actor: Actor, engine: TrainEngine, rollout: RolloutEngine) -> None:
        self.model, self.actor, self.engine, self.rollout = config.model, actor, engine, rollout
        self._check = SyncCheck(actor.dtype)

    def send(self) -> None:
        """Send the weights, or the adapters alone where the rollout engine takes them, and check the result."""
        weights = self.engine.full_weights()
        if self.rollout.merges_because or not self.model.lora:
            stream = self.actor.export_weights(weights)
        else:
            # The engine has loaded the artifact, whose weights are those below the adapters unless they were quantized only now.
            is_first = self.rollout.version == 0
            stream = self.actor.export_adapters(weights, with_base=is_first and self.model.quantization is not None)
        self.rollout.sync(self._check.observe(stream))
        self.check()

    @torch.no_grad()
    def check(self) -> None:
        """Compare weights, and log-probs of a fixed text, of trainer and rollout engine; only rounding may differ."""
        ids = probe_ids(self.rollout.tokenizer)
        batch = collate([ids[:1]], [ids[1:]]).to(next(self.actor.parameters()).device)
        trainer_logprobs, _ = self.actor(batch, SamplingDistribution())
        self._check.check(
            self.rollout.weight_samples(),
            self.rollout.prompt_logprobs(ids),
            trainer_logprobs[0],
            version=self.rollout.version,
        )
