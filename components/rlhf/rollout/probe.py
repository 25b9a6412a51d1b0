"""Verifies that a rollout engine has the trainer's weights: by values of the weights, and by log-probs of a fixed text."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.data.tokenizer import encode_prompt
from components.rlhf.models.stored import stored_weights
from components.rlhf.text.errors import InputError

# The log-probs of this text depend on every weight except the embeddings of other tokens.
PROBE_TEXT = "In 1969 the quick brown fox, 38 years old, said: 'What a film!' Then it left."
PROBE_TOKENS = 64
SAMPLE_SIZE = 256  # values of each weight
# A sync that changed at least this share of the values must change the log-probs of the probe.
MIN_CHANGED = 1e-3
MIN_TOKENS = (
    0.5  # the share of the tokens whose log-probs two models must change to be told apart by whether they change at all
)
# Nats at any token of the probe. In bf16 each engine rounds a logit of 20 to about the nearest 0.1 in its own way, so there the
# log-probs show only gross errors, and the values of the weights have to show the rest.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.75}


@dataclass(frozen=True, kw_only=True)
class WeightSample:
    """Values at fixed, evenly spaced places of one weight."""

    shape: tuple[int, ...]
    values: Tensor  # [at most SAMPLE_SIZE], on the CPU, in the precision of the weight

    @classmethod
    def of(cls, weight: Tensor) -> "WeightSample":
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), SAMPLE_SIZE), dtype=torch.float64).long()
        return cls(shape=tuple(weight.shape), values=flat[places.to(flat.device)].to("cpu", copy=True))


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the fixed text, at most PROBE_TOKENS of them."""
    return encode_prompt(tokenizer, PROBE_TEXT)[:PROBE_TOKENS]


def require_weights_of(folder: Path, received: Mapping[str, WeightSample], dtype: torch.dtype) -> None:
    """Raise InputError if an engine in this precision holds other values than a model folder, of the weights that it can show."""
    for name, weight in stored_weights(folder, received):
        held, stored = received[name], WeightSample.of(weight)
        if held.shape == stored.shape and not torch.equal(held.values.to(dtype), stored.values.to(dtype)):
            raise InputError(
                f"The rollout engine has other values of {name} than {folder}, from which it was loaded; set the rollout engine to hf."
            )


def require_equal_logprobs(engine: Tensor, trainer: Tensor, dtype: torch.dtype, *, model: str) -> None:
    """Raise InputError if an engine in this precision and transformers compute other log-probs [T] of the probe."""
    gap = (engine.double().cpu() - trainer.double().cpu()).abs().max().item()
    if not gap <= TOLERANCE[dtype]:  # also fails for nan
        raise InputError(
            f"The rollout engine did not sample from the {model}: log-probs of the probe differ by {gap:.3g} nats from those of "
            f"transformers, more than {TOLERANCE[dtype]:.3g}; set the rollout engine to hf."
        )


def require_other_logprobs(engine: tuple[Tensor, Tensor], trainer: tuple[Tensor, Tensor], *, model: str) -> None:
    """Raise InputError if an engine that loaded a second model still computes the log-probs [T] of the first one.

    Both pairs are of the probe, by the first and the second model, in the engine and in transformers. Two models can differ by less than
    TOLERANCE in bf16, so this compares distances. If the models are further apart than twice the distance d between the engine and
    transformers for the first model, an engine that kept the first model is nearer to it: by d, against more than 2 d - d.
    """
    first, second = (logprobs.double().cpu() for logprobs in trainer)
    before, after = (logprobs.double().cpu() for logprobs in engine)
    # An engine computes equal log-probs again from equal weights, and others at almost every token from any others.
    kept = torch.equal(before, after) and (first != second).double().mean().item() >= MIN_TOKENS
    rounding, apart = (before - first).norm().item(), (second - first).norm().item()
    nearer_to_first = (after - first).norm().item() <= (after - second).norm().item()
    if kept or (apart > 2 * rounding and nearer_to_first):
        raise InputError(
            f"The rollout engine did not load the {model}: on the probe it computes the log-probs of the model before; "
            "set the rollout engine to hf."
        )


class SyncCheck:
    """Compares the trainer with a rollout engine after every sync, and each sync with the one before.

    dtype is the engine's precision. Weights that the engine holds under another name or shape are seen only by the log-probs.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sent: dict[str, WeightSample] = {}
        self._sent_before: dict[str, WeightSample] = {}
        self._logprobs: Tensor | None = None

    def observe(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream of weights of one sync, unchanged, of which this remembers a sample."""
        self._sent = {}
        for name, weight in weights:
            sample = WeightSample.of(weight)
            self._sent[name] = WeightSample(shape=sample.shape, values=sample.values.to(self.dtype))
            yield name, weight

    def check(
        self,
        received: Mapping[str, WeightSample],
        engine_logprobs: Tensor,
        trainer_logprobs: Tensor,
        *,
        version: int,
    ) -> None:
        """Raise InputError if the engine lacks weights that were sent, or computes other log-probs.

        Both log-probs are [T], of the same ids, at temperature 1.
        """
        if engine_logprobs.shape != trainer_logprobs.shape:
            raise ValueError(
                f"log-probs of the engine have shape {engine_logprobs.shape}, of the trainer {trainer_logprobs.shape}"
            )
        stale = [
            name
            for name, sent in self._sent.items()
            if (held := received.get(name)) is not None
            and held.shape == sent.shape
            and not torch.equal(held.values.to(self.dtype), sent.values)
        ]
        if stale:
            raise _mismatch(version, f"{len(stale)} weights still have other values, such as {stale[0]}")
        if (
            self._logprobs is not None
            and self._changed() >= MIN_CHANGED
            and torch.equal(engine_logprobs, self._logprobs)
        ):
            raise _mismatch(
                version, f"{self._changed():.1%} of the weights have changed, but not the log-probs of the probe"
            )
        gap = (engine_logprobs.double().cpu() - trainer_logprobs.double().cpu()).abs().max().item()
        if not gap <= TOLERANCE[self.dtype]:  # also fails for nan
            raise _mismatch(
                version, f"log-probs of the probe differ by {gap:.3g} nats, more than {TOLERANCE[self.dtype]:.3g}"
            )
        self._logprobs, self._sent_before = engine_logprobs, self._sent

    def _changed(self) -> float:
        """The share of the sampled values, in the engine's precision, in which the last two syncs differ."""
        pairs = [
            (sent.values, self._sent_before[name].values)
            for name, sent in self._sent.items()
            if name in self._sent_before
        ]
        total = sum(len(new) for new, _ in pairs)
        return sum(int((new != old).sum()) for new, old in pairs) / total if total else 0.0


def _mismatch(version: int, reason: str) -> InputError:
    return InputError(
        f"The rollout engine's weights (version {version}) do not match the trainer's: {reason}; resume from the last checkpoint, "
        "or set ppo.rollout.engine to hf."
    )
