"""What a rollout engine must do.

Law of this room: prompts into completions. It knows nothing of rewards and advantages.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, Prompt


class RolloutEngine(Protocol):
    name: str  # what generates, with its version
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    version: int  # of the weights: the number of syncs

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int]) -> list[Completion]:
        """One completion a prompt. A completion depends on its prompt, its seed and the weights, not on its neighbours."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Take over the trainer's weights, by their Hugging Face names, one at a time; return the new version.

        Weights that are not among them stay as they are. A tied head follows the embeddings. Completions carry the version.
        """
        ...

    def prompt_logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-prob of each id but the first, given those before it, at temperature 1: [len(ids) - 1] fp32.

        For check_sync: what the trainer says of the same ids must agree after every sync.
        """
        ...

    def close(self) -> None: ...
