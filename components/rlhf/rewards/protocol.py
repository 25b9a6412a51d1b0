"""Whatever scores completions.

Law of this room: (prompt, response) into one number. No advantages, no engines.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from components.rlhf.data.records import Completion


class Scorer(Protocol):
    def score(self, completions: Sequence[Completion]) -> Tensor:
        """[B] fp32, higher is better; the score of a completion does not depend on the others."""
        ...
