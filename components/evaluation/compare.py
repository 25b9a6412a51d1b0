"""Samples both models on the held-out prompts with the same seeds, and scores the responses with judge and reward model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.data.batching import collate, split_by_tokens
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import decode_response, load_tokenizer
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import share_trunk
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.rewards.linear import load_judge
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.progress import Progress

MICROBATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class ScoredResponses:
    """The responses of one model and their scores, in the order of the prompts."""

    completions: list[Completion]
    judge_scores: list[float]
    cut_judge_scores: list[float]  # of the responses cut to the length of the shorter of the two, without EOS
    rewards: list[float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    prompts: list[Prompt]
    sft: ScoredResponses
    ppo: ScoredResponses
    kl: list[float]  # log-ratio of PPO to fine-tuned model in nats, summed over the tokens of each PPO response


def compare(
    config: EvaluationStageConfig,
    prompts: Sequence[Prompt],
    *,
    sft_model: Path,
    policy: Path,
    reward_model: Path,
    judge: Path,
    progress: Progress,
) -> Comparison:
    dtype, device = compute_dtype(config.model.precision), default_device()
    tokenizer, stop_ids = load_tokenizer(sft_model), load_stop_ids(sft_model)
    # Both models get the same seed for a prompt, so that they differ only in their weights.
    seeds = [derive_seed("evaluation", config.seed, row) for row in range(len(prompts))]
    responses: dict[str, list[Completion]] = {}
    lms = {}
    for name, folder in (("fine-tuned", sft_model), ("PPO", policy)):
        lms[name] = load_causal_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False).to(device)
        engine = HfRolloutEngine(lms[name], tokenizer, stop_ids=stop_ids)
        size = config.sampling.batch_size
        responses[name] = []
        for start in range(0, len(prompts), size):
            batch = slice(start, start + size)
            responses[name] += engine.generate(prompts[batch], config.sampling, seeds[batch])
            progress.step(len(responses[name]), len(prompts), {}, unit=f"{name} model responses")
    distribution = SamplingDistribution(
        temperature=config.sampling.temperature, min_new_tokens=config.sampling.min_new_tokens, stop_ids=stop_ids
    )
    frozen = config.model.num_frozen_layers
    if not share_trunk(lms["fine-tuned"], [lms["PPO"]], frozen):
        frozen = 0
    actors = {name: Actor(lm, num_frozen_layers=frozen, dtype=dtype) for name, lm in lms.items()}
    kl = sequence_kl(actors["PPO"], actors["fine-tuned"], responses["PPO"], distribution, device)
    reward_scorer = load_reward_scorer(reward_model, dtype=dtype, device=device, microbatch_tokens=MICROBATCH_TOKENS)
    judge_scorer = load_judge(judge)

    def score(completions: list[Completion], cut: list[Completion]) -> ScoredResponses:
        return ScoredResponses(
            completions=completions,
            judge_scores=judge_scorer.score(completions).tolist(),
            cut_judge_scores=judge_scorer.score(cut).tolist(),
            rewards=reward_scorer.score(completions).tolist(),
        )

    cut_sft, cut_ppo = cut_to_equal_length(responses["fine-tuned"], responses["PPO"], tokenizer)
    return Comparison(
        prompts=list(prompts),
        sft=score(responses["fine-tuned"], cut_sft),
        ppo=score(responses["PPO"], cut_ppo),
        kl=kl,
    )


def cut_to_equal_length(
    first: Sequence[Completion], second: Sequence[Completion], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Completion], list[Completion]]:
    """Cut both responses to each prompt to the tokens of the shorter one, without stop tokens."""

    def ids_without_stop(completion: Completion) -> list[int]:
        return completion.response_ids if completion.truncated else completion.response_ids[:-1]

    def cut(completion: Completion, length: int) -> Completion:
        ids = ids_without_stop(completion)[:length]
        text = decode_response(tokenizer, completion.prompt_ids, ids)
        return replace(completion, response_ids=ids, response=text, logprobs=None, truncated=True)

    lengths = [min(len(ids_without_stop(a)), len(ids_without_stop(b))) for a, b in zip(first, second, strict=True)]
    cut_first, cut_second = ([cut(c, n) for c, n in zip(cs, lengths, strict=True)] for cs in (first, second))
    return cut_first, cut_second


@torch.no_grad()
def sequence_kl(
    actor: Actor,
    reference: Actor,
    completions: Sequence[Completion],
    distribution: SamplingDistribution,
    device: torch.device,
) -> list[float]:
    """log pi(response) - log ref(response) of responses sampled from pi; the mean is an unbiased estimate of the KL.

    Frozen layers must be the same in both, and are computed once.
    """
    sums: Tensor = torch.zeros(len(completions))
    lengths = [len(c.prompt_ids) + len(c.response_ids) for c in completions]
    for group in split_by_tokens(lengths, MICROBATCH_TOKENS):
        rows = [completions[i] for i in group]
        batch = collate([c.prompt_ids for c in rows], [c.response_ids for c in rows]).to(device)
        states = reference.trunk(batch)
        logprobs, _ = actor(batch, distribution, states)
        ref_logprobs, _ = reference(batch, distribution, states)
        sums[group] = estimate_kl(logprobs, ref_logprobs, batch.response_mask, "k1").sum(dim=1).cpu()
    return [float(x) for x in sums]
