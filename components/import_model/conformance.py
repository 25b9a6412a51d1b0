"""Whether this library computes for a model exactly what transformers computes: checked on the model itself."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.batching import collate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import layers_of
from components.rlhf.models.loading import cast_parameters, load_causal_lm
from components.rlhf.models.packing import WINDOWS
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rollout.hf import sample
from components.rlhf.text.errors import InputError

TOLERANCE = 2e-3  # nats per token, in fp32
ROUNDED_TOLERANCE = 0.1  # of a model that had some weights in a higher precision than it is saved in
WINDOW = 8  # tokens; longer attention windows are cut to it, so that the texts below are longer than any window
LENGTHS = ((3, 9), (21, 12), (1, 30))  # tokens of (prompt, response): padded on either side, and longer than WINDOW
SHORT_LENGTHS = ((2, 3), (1, 7), (3, 1))  # within WINDOW, so that the rows are packed if the model can pack
NO_STOP = (-1,)
SAMPLING = SamplingConfig(max_new_tokens=6, temperature=0.8)


def check_conformance(lm: Any, *, num_frozen_layers: int, vocab_size: int | None = None) -> dict[str, float]:
    """The largest gap in nats between log-probs of this library and of the model's own forward pass on single texts.

    lm is in fp32. Checks that the model is causal, the log-probs of padded batches, with and without frozen layers, and responses
    sampled with a cache, two of them to one prompt, while other rows stop. Raises InputError with what differs, and by how much.
    vocab_size limits the ids.
    """
    name = f"{type(lm).__name__} ({lm.config.model_type})"
    try:
        with torch.no_grad():
            return _measure_gaps(lm, name, num_frozen_layers, vocab_size)
    except InputError:
        raise
    except Exception as error:  # the code of an architecture can raise any exception on inputs that it does not expect
        reason = (str(error).splitlines() or [""])[0][:200]
        frozen = f" with {num_frozen_layers} frozen layers" if num_frozen_layers else ""
        remedy = "set model.num_frozen_layers to 0 or choose" if num_frozen_layers else "choose"
        raise InputError(
            f"{name} cannot be run{frozen} ({type(error).__name__}: {reason}); {remedy} another architecture."
        ) from error


def _measure_gaps(lm: Any, name: str, num_frozen_layers: int, vocab_size: int | None) -> dict[str, float]:
    size = min(vocab_size or math.inf, lm.config.get_text_config().vocab_size)
    prompts, responses = _texts(LENGTHS, int(size))
    short_prompts, short_responses = _texts(SHORT_LENGTHS, int(size))
    if num_frozen_layers:
        layers_of(lm)
    gaps: dict[str, float] = {}
    with _short_windows(lm.config):
        own = [_own_logprobs(lm, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        gaps["causal"] = max(
            _gap(_own_logprobs(lm, prompt, [*response[:-1], (response[-1] + 1) % int(size)])[:-1], one[:-1])
            for prompt, response, one in zip(prompts, responses, own, strict=True)
        )
        _require(
            gaps["causal"],
            f"{name} is not causal: a later token changes the log-probs of earlier ones; choose a causal language model",
        )
        for frozen in sorted({0, num_frozen_layers}):
            actor = Actor(lm, num_frozen_layers=frozen, dtype=torch.float32)
            gap = max(_batch_gap(actor, prompts, responses), _batch_gap(actor, short_prompts, short_responses))
            remedy = "set model.num_frozen_layers to 0" if frozen else "choose another architecture"
            _require(gap, f"log-probs of {name} with {frozen} frozen layers differ from its own forward pass; {remedy}")
            gaps["logprobs_frozen" if frozen else "logprobs"] = gap
        gaps["sampling"] = _sampling_gap(lm, prompts)
        _require(
            gaps["sampling"],
            f"responses of {name} that are sampled with a cache differ from its own forward pass; choose another architecture",
        )
    return gaps


def _texts(lengths: Sequence[tuple[int, int]], size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids below size of prompts and responses with these lengths."""
    prompts, responses = (
        [_ids(row * 1000 + 100 * part, pair[part], size).tolist() for row, pair in enumerate(lengths)]
        for part in (0, 1)
    )
    return prompts, responses


def _batch_gap(actor: Actor, prompts: list[list[int]], responses: list[list[int]]) -> float:
    """Between the log-probs of one batch and of the model's own forward pass on each text."""
    batch = collate(prompts, responses).to(actor.lm.device)
    logprobs, _ = actor(batch, SamplingDistribution(), actor.trunk(batch))
    return max(
        _gap(logprobs[row, : len(response)], _own_logprobs(actor.lm, prompt, response))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    )


@torch.no_grad()
def check_scalar_conformance(lm: Any) -> float:
    """The largest gap between scores of padded texts and those of the model's own forward pass. lm is in fp32.

    Raises InputError if it is not rounding.
    """
    name = f"{type(lm).__name__} ({lm.config.model_type})"
    size = lm.config.get_text_config().vocab_size
    texts = [_ids(row, sum(lengths), size).tolist() for row, lengths in enumerate(LENGTHS)]
    pad = lm.config.get_text_config().pad_token_id
    texts = [
        [i if i != pad else (i + 1) % size for i in text] for text in texts
    ]  # it reads the last token that is not PAD
    with _short_windows(lm.config):
        own = torch.cat([lm(input_ids=torch.tensor([text])).logits[:, 0] for text in texts])
        batch = collate([text[:1] for text in texts], [text[1:] for text in texts])
        scores = ScalarModel(lm, num_frozen_layers=0, dtype=torch.float32).scores(batch)
    gap = _gap(scores, own) / max(float(own.abs().max()), 1.0)
    if gap > TOLERANCE:
        raise InputError(
            f"scores of {name} differ from its own forward pass by up to {gap:.3g} ({TOLERANCE:g} is tolerated); "
            "choose another architecture."
        )
    return gap


@torch.no_grad()
def fixed_logprobs(lm: Any) -> Tensor:
    """Log-probs of a fixed text by the model's own forward pass: [T] fp32."""
    ids = _ids(7, 24, lm.config.get_text_config().vocab_size).tolist()
    return _own_logprobs(lm, ids[:1], ids[1:])


def require_same_after_saving(folder: Path, before: Tensor, dtype: torch.dtype) -> Any:
    """The saved model in fp32. Raises InputError unless it gives the log-probs that it gave before it was saved in dtype."""
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    after = fixed_logprobs(lm)
    gap = _gap(after, before)
    tolerance = TOLERANCE if dtype == torch.float32 else ROUNDED_TOLERANCE
    if gap > tolerance:
        raise InputError(
            f"The model does not survive saving and loading: its log-probs change by up to {gap:.3g} nats ({tolerance:g} is "
            "tolerated); choose another architecture."
        )
    return lm


def require_bf16(lm: Any) -> None:
    """Raise InputError if training or sampling in bf16 fails. Rounds the weights of lm, which is in fp32, to bf16."""
    size = lm.config.get_text_config().vocab_size
    prompts = [_ids(row, length, size).tolist() for row, (length, _) in enumerate(LENGTHS)]
    try:
        batch = collate(prompts, prompts).to(lm.device)
        lm.requires_grad_(True)
        actor = Actor(lm, num_frozen_layers=0, dtype=torch.bfloat16)  # as trained: fp32 weights under autocast
        actor(batch, SamplingDistribution())[0].sum().backward()
        lm.zero_grad(set_to_none=True)
        sample(cast_parameters(lm, torch.bfloat16), prompts, SAMPLING, range(len(prompts)), stop_ids=NO_STOP)
    except Exception as error:  # the code of an architecture can raise any exception for a mixture of dtypes
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(
            f"{type(lm).__name__} ({lm.config.model_type}) cannot be trained or sampled in bf16 ({type(error).__name__}: {reason}); "
            "set model.precision to fp32."
        ) from error


def _sampling_gap(lm: Any, prompts: list[list[int]]) -> float:
    """Between the log-probs of sampled responses and the own forward pass, once without stops and once with rows that stop.

    One prompt has two responses.
    """
    prompts = [*prompts, prompts[1]]
    seeds = range(len(prompts))
    samples = sample(lm, prompts, SAMPLING, seeds, stop_ids=NO_STOP)
    stop = samples[0][0][1]  # ends the first row, and maybe others, after two tokens
    samples += sample(lm, prompts, SAMPLING, seeds, stop_ids=(stop,))
    return max(
        _gap(torch.tensor(logprobs), _own_logprobs(lm, prompt, ids, SAMPLING.temperature))
        for prompt, (ids, logprobs) in zip([*prompts, *prompts], samples, strict=True)
    )


def _own_logprobs(lm: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs [T] of the response by the model's own forward pass over one text."""
    ids = torch.tensor([prompt + response], device=lm.device)
    logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()


def _gap(first: Tensor, second: Tensor) -> float:
    difference = (first.cpu() - second.cpu()).abs()
    return float(difference.max()) if difference.isfinite().all() else math.inf


def _require(gap: float, sentence: str) -> None:
    if gap > TOLERANCE:
        what, _, remedy = sentence.partition(";")
        raise InputError(f"{what} by up to {gap:.3g} nats per token ({TOLERANCE:g} is tolerated);{remedy}.")


def _ids(seed: int, length: int, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Cut the attention windows in a config, from which every forward pass makes its masks."""
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    changed = [
        (part, name, value)
        for part in parts
        for name in WINDOWS
        if isinstance(value := getattr(part, name, None), int) and value > WINDOW
    ]
    for part, name, _ in changed:
        setattr(part, name, WINDOW)
    try:
        yield
    finally:
        for part, name, value in changed:
            setattr(part, name, value)
