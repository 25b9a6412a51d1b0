"""The interface of scorers."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from components.rlhf.data.records import Completion


class Scorer(Protocol):
    def score(self, completions: Sequence[Completion]) -> Tensor:
        """Scores [B] fp32, higher is better. The score of a completion does not depend on the others."""
        ...
