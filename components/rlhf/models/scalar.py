"""A decoder with a scalar head: the reward model and the critic."""

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.rlhf.data.batching import TokenBatch
from components.rlhf.models.layers import HEAD_NAME, freeze_lower_layers
from components.rlhf.models.lora import adapters_enabled
from components.rlhf.models.packing import pack_limit, run_rows
from components.rlhf.models.precision import autocast_to
from components.rlhf.models.router import RouterLoss


class ScalarModel(nn.Module):
    """A sequence classification model with one output (head named `score`), which can be computed at any position.

    mean and std normalize scores: normalized = (raw - mean) / std.
    trains selects what is trainable: the layers above the frozen ones with the head, or only the head.
    With with_adapters False the LoRA adapters are off, which gives the reward model from the weights of the critic.
    router_loss is the auxiliary loss of a mixture of experts in the last forward pass, if gradients are enabled; else None.
    """

    def __init__(
        self,
        lm: Any,
        *,
        num_frozen_layers: int,
        dtype: torch.dtype,
        mean: float = 0.0,
        std: float = 1.0,
        trains: Literal["layers", "head"] = "layers",
        with_adapters: bool = True,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.num_frozen_layers = num_frozen_layers
        self.dtype = dtype
        self.mean, self.std = mean, std
        self.trains = trains
        self.with_adapters = with_adapters
        self.router_loss: Tensor | None = None
        self._router = RouterLoss.of(lm.config)
        self.pack_limit = pack_limit(lm)
        freeze_lower_layers(lm, num_frozen_layers)
        if trains == "head":
            for (
                name,
                parameter,
            ) in lm.named_parameters():  # not by base_model, which in some architectures is the whole model
                parameter.requires_grad_(name.startswith(f"{HEAD_NAME}."))

    def features(self, batch: TokenBatch, states: Tensor | None = None) -> Tensor:
        """Final hidden states [B, S, H]; states are those after the frozen layers [B, S, H], computed if None."""
        with autocast_to(self.dtype, batch.input_ids.device), adapters_enabled(self.lm, on=self.with_adapters):
            if states is None and self.num_frozen_layers:
                with torch.no_grad():
                    states = self._run(batch, stop=self.num_frozen_layers)
            start = 0 if states is None else self.num_frozen_layers
            with contextlib.nullcontext() if self.trains == "layers" else torch.no_grad():
                router = self._router if torch.is_grad_enabled() else None
                options = {} if router is None else router.options
                output = self._run(batch, start=start, states=states, **options)
            self.router_loss = None if router is None else router(output, batch.attention_mask())
            features: Tensor = output.last_hidden_state
            return features

    def _run(self, batch: TokenBatch, **options: Any) -> Any:
        return run_rows(self.lm, batch.input_ids, batch.lengths, pack_limit=self.pack_limit, **options)

    def apply_head(self, features: Tensor) -> Tensor:
        """Normalized scalar of features [..., H] -> [...] fp32."""
        raw: Tensor = self.lm.score(features).squeeze(-1)
        return (raw - self.mean) / self.std

    def forward(self, batch: TokenBatch, states: Tensor | None = None, action_features: Tensor | None = None) -> Tensor:
        """Value of the state before each action: [B, T] fp32, 0 at padding. action_features [B, T, H] are computed if None."""
        if action_features is None:
            action_features = before_actions(batch, self.features(batch, states))
        return torch.where(batch.response_mask, self.apply_head(action_features), 0)

    def scores(self, batch: TokenBatch, states: Tensor | None = None) -> Tensor:
        """Score of each text, computed at its last token: [B] fp32."""
        return self.apply_head(at_last_token(batch, self.features(batch, states)))

    def prefix_scores(self, batch: TokenBatch) -> Tensor:
        """Score of the text up to and including each response token: [B, T] fp32, 0 at padding."""
        features = self.features(batch)
        rows = torch.arange(len(batch), device=features.device)[:, None]
        positions = (batch.state_positions() + 1).clamp(max=features.shape[1] - 1)
        return torch.where(batch.response_mask, self.apply_head(features[rows, positions]), 0)


def before_actions(batch: TokenBatch, features: Tensor) -> Tensor:
    """Of features [B, S, H] those of the state before each action: [B, T, H]."""
    rows = torch.arange(len(batch), device=features.device)[:, None]
    return features[rows, batch.state_positions()]


def at_last_token(batch: TokenBatch, features: Tensor) -> Tensor:
    """Of features [B, S, H] those of the last token of each row: [B, H]."""
    return features[torch.arange(len(batch), device=features.device), batch.last_positions()]
