"""Samples both models on the held-out prompts with the same seeds, scores the responses with the reward model, and measures the KL."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.evaluation.ranks import Ranks
from components.evaluation.sampling import Sampled, sample_models
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.policy import TITLES, Method
from components.rlhf.data.batching import collate, collate_completions
from components.rlhf.data.microbatches import equal_passes
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import decode_response, load_tokenizer
from components.rlhf.engine.factory import max_over_shards
from components.rlhf.engine.shares import over_ranks
from components.rlhf.maths.kl import exact_kl, truncated_kl
from components.rlhf.maths.logprobs import token_logprobs
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import share_trunk
from components.rlhf.models.loading import load_stop_ids
from components.rlhf.models.packing import plan_for
from components.rlhf.rollout.controls import sampling_distribution
from components.rlhf.rollout.probe import probe_ids, require_equal_logprobs, require_other_logprobs
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress

MICROBATCH_TOKENS = 4096
SFT = "fine-tuned"  # name of the SFT model in messages; that of the policy is its method's


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses of one model, one per row."""

    completions: list[Completion]
    cut: list[Completion]  # to the length of the shorter response of the row, without EOS
    rewards: list[float] | None  # normalized scores of the reward model; None in a run without one


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows of a response of each model to the same prompt; the rows of one prompt are consecutive."""

    groups: list[int]  # number of the prompt of each row
    sft: Responses
    policy: Responses
    kl: list[
        float
    ]  # log-ratio of policy to fine-tuned model in nats, summed over the model's tokens of each response of the policy
    exact_kl: list[float]  # KL of the next-token distributions in nats, summed over the same tokens
    method: Method = "ppo"  # that has trained the policy
    num_failed: int = 0  # rows that were left out, because the environment failed

    @property
    def prompts(self) -> list[Prompt]:
        return [completion.prompt for completion in self.policy.completions]


def compare(
    config: EvaluationStageConfig,
    prompts: Sequence[Prompt],
    *,
    sft_model: Path,
    policy: Path,
    reward_model: Path | None,
    progress: Progress,
    ranks: Ranks | None = None,
    code: Path | None = None,
    sft_completions: Sequence[Completion] | None = None,
) -> Comparison:
    """Sample both models, measure the KL, and score the responses. Every rank gets the whole comparison.

    The sampled model, the two models of the KL, and the reward model, if there is one, are in memory one after the other.
    sft_completions are responses of the fine-tuned model to the same rows, which then is not sampled again.
    """
    ranks = ranks or Ranks.of(config)
    tokenizer, stop_ids = load_tokenizer(sft_model), load_stop_ids(sft_model)
    groups = [number for number in range(len(prompts)) for _ in range(config.evaluation.num_samples)]
    name = TITLES[config.method]
    folders = {SFT: sft_model, name: policy}
    to_sample = [(name, policy)] if sft_completions is not None else list(folders.items())
    rows = [prompts[number] for number in groups]
    sampled = sample_models(config, rows, to_sample, ranks, progress, code=code)
    # Responses of a rival's evaluation come without an environment, so that none of its rows has failed.
    kept = rows_without_failures(sampled)
    groups = [groups[row] for row in kept]
    sampled = {
        each: replace(found, completions=[found.completions[row] for row in kept]) for each, found in sampled.items()
    }
    sft = list(sft_completions) if sft_completions is not None else sampled[SFT].completions
    own = sampled[name].completions
    distribution = sampling_distribution(config.sampling, stop_ids)
    ranks.group.watchdog("evaluation, KL")
    kl, exact = measure_kl(folders, sampled, distribution, ranks, num_frozen_layers=config.model.num_frozen_layers)
    ranks.release()
    rewards = None
    if reward_model is not None:
        ranks.group.watchdog("evaluation, scores of the reward model")
        rewards = score(reward_model, [*sft, *own], ranks)
        ranks.release()
    cut_sft, cut_own = cut_to_equal_length(sft, own, tokenizer, stop_ids)
    return Comparison(
        groups=groups,
        sft=Responses(completions=sft, cut=cut_sft, rewards=rewards and rewards[: len(sft)]),
        policy=Responses(completions=own, cut=cut_own, rewards=rewards and rewards[len(sft) :]),
        kl=kl,
        exact_kl=exact,
        method=config.method,
        num_failed=len(rows) - len(kept),
    )


def rows_without_failures(sampled: Mapping[str, Sampled]) -> list[int]:
    """Rows in which the environment failed for neither model: the others say nothing. Raises InputError if none is left."""
    pairs = zip(*(each.completions for each in sampled.values()), strict=True)
    kept = [row for row, completions in enumerate(pairs) if not any(c.failure for c in completions)]
    if not kept:
        raise InputError("The environment fails for every held-out prompt; correct it.")
    return kept


def score(reward_model: Path, completions: Sequence[Completion], ranks: Ranks) -> list[float]:
    """Normalized scores of a reward model."""
    scores: list[float] = (
        ranks.load_scorer(reward_model, microbatch_tokens=MICROBATCH_TOKENS).score(completions).tolist()
    )
    return scores


def cut_to_equal_length(
    first: Sequence[Completion],
    second: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> tuple[list[Completion], list[Completion]]:
    """Cut both responses to each prompt to the tokens of the shorter one, without stop tokens and stop strings.

    Only tokens of the model count; those of an environment before the cut stay.
    """

    def cut(completion: Completion, size: int) -> Completion:
        ids = completion.response_ids[:size]
        text = decode_response(tokenizer, completion.prompt_ids, ids)
        if _has_stop_string(completion, stop_ids):
            text = text[: len(completion.response)]
        mask = completion.response_mask and completion.response_mask[:size]
        return replace(
            completion, response_ids=ids, response=text, logprobs=None, truncated=True, response_mask=mask, turns=()
        )

    cut_first, cut_second = [], []
    for a, b in zip(first, second, strict=True):
        own_a, own_b = (_model_positions(c, len(ids_without_stop(c, tokenizer, stop_ids))) for c in (a, b))
        length = min(len(own_a), len(own_b))
        cut_first.append(cut(a, own_a[length - 1] + 1 if length else 0))
        cut_second.append(cut(b, own_b[length - 1] + 1 if length else 0))
    return cut_first, cut_second


def _model_positions(completion: Completion, size: int) -> list[int]:
    """Positions of the model's tokens among the first `size` of the response."""
    mask = completion.response_mask or [True] * size
    return [position for position in range(size) if mask[position]]


def ids_without_stop(completion: Completion, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[int]:
    """The ids of a response without its stop token, or without those that only belong to its stop string."""
    ids = completion.response_ids
    if not _has_stop_string(completion, stop_ids):
        return ids if completion.truncated else ids[:-1]
    while ids and decode_response(tokenizer, completion.prompt_ids, ids[:-1]).startswith(completion.response):
        ids = ids[:-1]
    return ids


def _has_stop_string(completion: Completion, stop_ids: Sequence[int]) -> bool:
    return not completion.truncated and completion.response_ids[-1] not in stop_ids


@torch.no_grad()
def measure_kl(
    folders: Mapping[str, Path],
    sampled: Mapping[str, Sampled],
    distribution: SamplingDistribution,
    ranks: Ranks,
    *,
    num_frozen_layers: int,
) -> tuple[list[float], list[float]]:
    """Both estimates of sequence_kl() for the policy's responses; folders has the fine-tuned model first, then the policy.

    Raises InputError if the engine that sampled computes other log-probs than these models.
    """
    _, policy = folders
    lms = {name: ranks.load_lm(folder) for name, folder in folders.items()}
    frozen = 0 if ranks.shards_weights else num_frozen_layers
    if not share_trunk(lms[SFT], [lms[policy]], frozen):
        frozen = 0
    actors = {name: ranks.actor(lm, num_frozen_layers=frozen) for name, lm in lms.items()}
    ids = probe_ids(load_tokenizer(folders[SFT]))
    probe = collate([ids[:1]], [ids[1:]]).to(ranks.device)
    states = actors[SFT].trunk(probe)
    own = {name: actor(probe, SamplingDistribution(), states)[0][0] for name, actor in actors.items()}
    for name, responses in sampled.items():
        require_equal_logprobs(responses.probe, own[name], ranks.dtype, model=f"{name} model")
    if SFT in sampled:  # else the engine was started with the policy
        engine = sampled[SFT].probe, sampled[policy].probe
        require_other_logprobs(engine, (own[SFT], own[policy]), model=f"{policy} model")
    most = max_over_shards(ranks.training, ranks.group)

    def measure(own: list[Completion]) -> list[tuple[float, float]]:
        estimates = sequence_kl(actors[policy], actors[SFT], own, distribution, ranks.device, max_over_ranks=most)
        return list(zip(*estimates, strict=True))

    kl = over_ranks(ranks.group, sampled[policy].completions, measure)
    return [sampled for sampled, _ in kl], [exact for _, exact in kl]


@torch.no_grad()
def sequence_kl(
    actor: Actor,
    reference: Actor,
    completions: Sequence[Completion],
    distribution: SamplingDistribution,
    device: torch.device,
    *,
    max_over_ranks: Callable[[int], int] = int,
) -> tuple[list[float], list[float]]:
    """Two unbiased estimates of the KL per response, from responses sampled from pi, each summed over their tokens.

    The first is log pi(token) - log ref(token), the second the exact KL of the next-token distributions, which has less variance and
    is never negative; where sampling truncates them, it is the exact mean of the first (maths/kl.py, truncated_kl). Frozen layers must
    be the same in both models, and are computed once. max_over_ranks(n) is the largest n of the ranks that shard the models, which run
    equally many passes.
    """
    sampled, exact = torch.zeros(len(completions)), torch.zeros(len(completions))
    lengths = [len(c.prompt_ids) + len(c.response_ids) for c in completions]
    for group, _ in equal_passes(lengths, MICROBATCH_TOKENS, max_over_ranks, plan_for(actor, reference)):
        rows = [completions[i] for i in group]
        batch = collate_completions(rows).to(device)
        states, mask = reference.trunk(batch), batch.response_mask
        labels, done = batch.response_ids[mask], 0
        sampled_parts: list[Tensor] = []
        exact_parts: list[Tensor] = []
        for logits, ref_logits in zip(
            actor.logits(batch, distribution, states), reference.logits(batch, distribution, states), strict=True
        ):
            piece = labels[done : done + len(logits)]
            done += len(logits)
            logprobs, ref_logprobs = (
                token_logprobs(distribution.truncate(x, piece), piece, distribution.temperature)
                for x in (logits, ref_logits)
            )
            sampled_parts.append(logprobs - ref_logprobs)
            exact_parts.append(_exact_kl(logits, ref_logits, distribution))
        zeros = torch.zeros(mask.shape, device=device)
        sampled[group] = zeros.masked_scatter(mask, torch.cat(sampled_parts)).sum(dim=1).cpu()
        exact[group] = zeros.masked_scatter(mask, torch.cat(exact_parts)).sum(dim=1).cpu()
    return [float(x) for x in sampled], [float(x) for x in exact]


def _exact_kl(logits: Tensor, ref_logits: Tensor, distribution: SamplingDistribution) -> Tensor:
    """The KL of each next-token distribution: [n, V] -> [n]."""
    if not distribution.truncates:
        return exact_kl(logits, ref_logits, distribution.temperature)
    kept = distribution.kept(logits), distribution.kept(ref_logits)
    return truncated_kl(logits, ref_logits, *kept, distribution.temperature)
