"""Samples both models on the held-out prompts with the same seeds, scores the responses with the reward model, and measures the KL."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.data.tokenizer import decode_response, load_tokenizer
from components.rlhf.maths.kl import exact_kl
from components.rlhf.maths.logprobs import token_logprobs
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import share_trunk
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.models.packing import plan_for
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.progress import Progress

MICROBATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses of one model, one per row."""

    completions: list[Completion]
    cut: list[Completion]  # to the length of the shorter response of the row, without EOS
    rewards: list[float]  # normalized scores of the reward model


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows of a response of each model to the same prompt; the rows of one prompt are consecutive."""

    groups: list[int]  # number of the prompt of each row
    sft: Responses
    ppo: Responses
    kl: list[float]  # log-ratio of PPO to fine-tuned model in nats, summed over the tokens of each PPO response
    exact_kl: list[float]  # KL of the next-token distributions in nats, summed over the same tokens

    @property
    def prompts(self) -> list[Prompt]:
        return [completion.prompt for completion in self.ppo.completions]


def compare(
    config: EvaluationStageConfig,
    prompts: Sequence[Prompt],
    *,
    sft_model: Path,
    policy: Path,
    reward_model: Path,
    progress: Progress,
) -> Comparison:
    dtype, device = compute_dtype(config.model.precision), default_device()
    tokenizer, stop_ids = load_tokenizer(sft_model), load_stop_ids(sft_model)
    groups = [number for number in range(len(prompts)) for _ in range(config.evaluation.num_samples)]
    # Both models get the same seed for a row, so that they differ only in their weights.
    seeds = [derive_seed("evaluation", config.seed, row) for row in range(len(groups))]
    responses: dict[str, list[Completion]] = {}
    lms = {}
    for name, folder in (("fine-tuned", sft_model), ("PPO", policy)):
        lms[name] = load_causal_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False).to(device)
        engine = HfRolloutEngine(lms[name], tokenizer, stop_ids=stop_ids)
        size = config.sampling.batch_size
        responses[name] = []
        for start in range(0, len(groups), size):
            batch = [prompts[number] for number in groups[start : start + size]]
            responses[name] += engine.generate(batch, config.sampling, seeds[start : start + size])
            progress.step(len(responses[name]), len(groups), {}, unit=f"{name} model responses")
    distribution = SamplingDistribution(
        temperature=config.sampling.temperature, min_new_tokens=config.sampling.min_new_tokens, stop_ids=stop_ids
    )
    frozen = config.model.num_frozen_layers
    if not share_trunk(lms["fine-tuned"], [lms["PPO"]], frozen):
        frozen = 0
    actors = {name: Actor(lm, num_frozen_layers=frozen, dtype=dtype) for name, lm in lms.items()}
    kl, exact = sequence_kl(actors["PPO"], actors["fine-tuned"], responses["PPO"], distribution, device)
    scorer = load_reward_scorer(reward_model, dtype=dtype, device=device, microbatch_tokens=MICROBATCH_TOKENS)
    cut_sft, cut_ppo = cut_to_equal_length(responses["fine-tuned"], responses["PPO"], tokenizer)
    return Comparison(
        groups=groups,
        sft=Responses(
            completions=responses["fine-tuned"], cut=cut_sft, rewards=scorer.score(responses["fine-tuned"]).tolist()
        ),
        ppo=Responses(completions=responses["PPO"], cut=cut_ppo, rewards=scorer.score(responses["PPO"]).tolist()),
        kl=kl,
        exact_kl=exact,
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
) -> tuple[list[float], list[float]]:
    """Two unbiased estimates of the KL per response, from responses sampled from pi, each summed over their tokens.

    The first is log pi(token) - log ref(token), the second the exact KL of the next-token distributions, which has less variance and
    is never negative. Frozen layers must be the same in both models, and are computed once.
    """
    sampled, exact = torch.zeros(len(completions)), torch.zeros(len(completions))
    lengths = [len(c.prompt_ids) + len(c.response_ids) for c in completions]
    for group in plan_for(actor, reference)(lengths, MICROBATCH_TOKENS):
        rows = [completions[i] for i in group]
        batch = collate([c.prompt_ids for c in rows], [c.response_ids for c in rows]).to(device)
        states, mask = reference.trunk(batch), batch.response_mask
        labels, done = batch.response_ids[mask], 0
        sampled_parts: list[Tensor] = []
        exact_parts: list[Tensor] = []
        for logits, ref_logits in zip(
            actor.logits(batch, distribution, states), reference.logits(batch, distribution, states), strict=True
        ):
            piece = labels[done : done + len(logits)]
            done += len(logits)
            logprobs, ref_logprobs = (token_logprobs(x, piece, distribution.temperature) for x in (logits, ref_logits))
            sampled_parts.append(logprobs - ref_logprobs)
            exact_parts.append(exact_kl(logits, ref_logits, distribution.temperature))
        zeros = torch.zeros(mask.shape, device=device)
        sampled[group] = zeros.masked_scatter(mask, torch.cat(sampled_parts)).sum(dim=1).cpu()
        exact[group] = zeros.masked_scatter(mask, torch.cat(exact_parts)).sum(dim=1).cpu()
    return [float(x) for x in sampled], [float(x) for x in exact]
