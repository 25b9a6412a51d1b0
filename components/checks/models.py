"""The two models that are compared, of which one at a time is in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.precision import default_device
from components.rlhf.runtime.memory import release_models
from components.rlhf.text.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Models:
    sft: Path
    policy: Path
    dtype: torch.dtype
    progress: Progress

    @property
    def folders(self) -> dict[str, Path]:
        """By their names in messages; the SFT model first."""
        return {"fine-tuned": self.sft, "trained": self.policy}

    @property
    def device(self) -> torch.device:
        return default_device()

    def load(self, folder: Path) -> Any:
        """A causal language model that only computes."""
        return load_causal_lm(folder, num_frozen_layers=0, dtype=self.dtype, trainable=False, device=self.device)

    def release(self) -> None:
        """Free the memory of models that nobody holds any more."""
        release_models()
