"""Both models on the same held-out prompts with the same draws, scored by the judge and by the reward model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.data.batching import collate, split_by_tokens
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import share_trunk
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm, load_stop_ids, reward_normalization
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.linear import load_judge
from components.rlhf.rewards.reward_model import RewardModelScorer
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.progress import Progress

MICROBATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one model answered, in the order of the prompts, and what was thought of it."""

    completions: list[Completion]
    judge_scores: list[float]
    cut_judge_scores: list[float]  # of the answers cut to the length of the shorter of the two, neither with an end
    rewards: list[float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    prompts: list[Prompt]
    sft: Side
    ppo: Side
    kl: list[float]  # log-ratio of each PPO response, PPO model to fine-tuned model, summed over its tokens: nats


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
    # The same seed for the same prompt in both models: what differs is the model, not the luck of the draw.
    seeds = [derive_seed("evaluation", config.seed, row) for row in range(len(prompts))]
    answers: dict[str, list[Completion]] = {}
    lms = {}
    for name, folder in (("fine-tuned", sft_model), ("PPO", policy)):
        lms[name] = load_causal_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False).to(device)
        engine = HfRolloutEngine(lms[name], tokenizer, stop_ids=stop_ids)
        size = config.sampling.batch_size
        answers[name] = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            answers[name] += engine.generate(prompts[part], config.sampling, seeds[part])
            progress.step(len(answers[name]), len(prompts), {}, unit=f"{name} model answered")
    distribution = SamplingDistribution(
        temperature=config.sampling.temperature, min_new_tokens=config.sampling.min_new_tokens, stop_ids=stop_ids
    )
    frozen = config.model.num_frozen_layers
    if not share_trunk(lms["fine-tuned"], [lms["PPO"]], frozen):
        frozen = 0
    actors = {name: Actor(lm, num_frozen_layers=frozen, dtype=dtype) for name, lm in lms.items()}
    kl = sequence_kl(actors["PPO"], actors["fine-tuned"], answers["PPO"], distribution, device)
    mean, std = reward_normalization(reward_model)
    lm = load_scalar_lm(reward_model, num_frozen_layers=0, dtype=dtype, trainable=False).to(device)
    rewarder = RewardModelScorer(
        ScalarModel(lm, num_frozen_layers=0, dtype=dtype, mean=mean, std=std), microbatch_tokens=MICROBATCH_TOKENS
    )
    judging = load_judge(judge)

    def side(completions: list[Completion], cut: list[Completion]) -> Side:
        return Side(
            completions=completions,
            judge_scores=judging.score(completions).tolist(),
            cut_judge_scores=judging.score(cut).tolist(),
            rewards=rewarder.score(completions).tolist(),
        )

    cut_sft, cut_ppo = cut_to_equal_length(answers["fine-tuned"], answers["PPO"], tokenizer)
    return Comparison(
        prompts=list(prompts),
        sft=side(answers["fine-tuned"], cut_sft),
        ppo=side(answers["PPO"], cut_ppo),
        kl=kl,
    )


def cut_to_equal_length(
    first: Sequence[Completion], second: Sequence[Completion], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Completion], list[Completion]]:
    """Both answers to each prompt cut to the tokens of the shorter one, stop token not counted: equal in length and ending."""

    def words(completion: Completion) -> list[int]:
        return completion.response_ids if completion.truncated else completion.response_ids[:-1]

    def cut(completion: Completion, length: int) -> Completion:
        ids = words(completion)[:length]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        return replace(completion, response_ids=ids, response=text, logprobs=None, truncated=True)

    lengths = [min(len(words(a)), len(words(b))) for a, b in zip(first, second, strict=True)]
    a, b = ([cut(c, n) for c, n in zip(side, lengths, strict=True)] for side in (first, second))
    return a, b


@torch.no_grad()
def sequence_kl(
    actor: Actor,
    reference: Actor,
    completions: Sequence[Completion],
    distribution: SamplingDistribution,
    device: torch.device,
) -> list[float]:
    """log pi(response) - log ref(response) of responses that pi sampled: its mean is an unbiased estimate of the KL.

    Frozen layers, where the two have any, are the same in both and computed once.
    """
    sums: Tensor = torch.zeros(len(completions))
    lengths = [len(c.prompt_ids) + len(c.response_ids) for c in completions]
    for group in split_by_tokens(lengths, MICROBATCH_TOKENS):
        rows = [completions[i] for i in group]
        batch = collate([c.prompt_ids for c in rows], [c.response_ids for c in rows]).to(device)
        states = reference.trunk(batch)
        ours, _ = actor(batch, distribution, states)
        theirs, _ = reference(batch, distribution, states)
        sums[group] = estimate_kl(ours, theirs, batch.response_mask, "k1").sum(dim=1).cpu()
    return [float(x) for x in sums]
