"""The interface of rollout engines."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rollout.probe import WeightSample


class Sampler(Protocol):
    """What samples responses: an engine, or an engine that plays with an environment (components/rlhf/environments)."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[int], *, greedy: bool = False
    ) -> list[Completion]:
        """One response to each prompt. It depends on its prompt, its seed and the weights, not on the rest of the batch."""
        ...

    def close(self) -> None: ...


class RolloutEngine(Protocol):
    name: str  # library and its version
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    version: int  # version of the weights: the number of syncs so far
    merges_because: str  # why sync() needs adapters merged into the weights; empty if it takes adapters by themselves

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        after: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Sample one completion per prompt. It depends on its prompt, its seed and the weights, not on the rest of the batch.

        greedy takes the most probable token in every step, whatever the seed; its log-prob is that at temperature 1. after are ids that
        follow each prompt: completions continue them, and have them at the end of their prompt_ids. limits are numbers of new tokens,
        1 to max_new_tokens, of each prompt; None is max_new_tokens for all.
        """
        ...

    def load(self, folder: Path) -> int:
        """Load the weights of another model folder of the same architecture; return the new version."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Load the trainer's weights, streamed under their Hugging Face names; return the new version.

        Weights that are not in the stream keep their values. A tied head follows the embeddings. Adapters are NAME.lora_A.weight
        [r, in] and NAME.lora_B.weight [out, r] of a module NAME, whose update is B A.
        """
        ...

    def weight_samples(self) -> Mapping[str, WeightSample]:
        """Values of each weight that the engine holds under its Hugging Face name and shape, in the engine's precision.

        An engine may hold others in a form of its own (fused, packed, sharded); those are left out.
        """
        ...

    def prompt_logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-prob of each id after the first, given those before it, at temperature 1: [len(ids) - 1] fp32.

        SyncCheck compares it with the trainer's after every sync.
        """
        ...

    def close(self) -> None: ...
