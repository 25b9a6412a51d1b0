"""Responses of several turns in the evaluation: only what the model says is measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from components.evaluation.compare import cut_to_equal_length, sequence_kl
from components.evaluation.judge_curve import judge_curve
from components.rlhf.data.records import ResponseTurn, ValidationSample
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm
from tests.support.ppo_runs import completion

FP32 = torch.float32
ROWS = [
    replace(completion([5, 6], [7, 8, 9, 10, 11, 0]), response_mask=[True, False, False, True, True, True]),
    replace(completion([5], [12, 13, 14, 15], truncated=True), response_mask=[True, True, False, True]),
    completion([9, 8, 7], [3, 4, 0]),
]


def test_kl_sums_the_tokens_of_the_model(tiny_model: Path) -> None:
    lms = [load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32, trainable=False) for _ in range(2)]
    with torch.no_grad():
        for number, parameter in enumerate(lms[0].parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    actors = [Actor(lm, num_frozen_layers=0, dtype=FP32) for lm in lms]
    kl, exact = sequence_kl(actors[0], actors[1], ROWS, SamplingDistribution(), torch.device("cpu"))
    for c, found, found_exact in zip(ROWS, kl, exact, strict=True):
        ids, start, slow, slow_exact = torch.tensor([c.prompt_ids + c.response_ids]), len(c.prompt_ids), 0.0, 0.0
        for t, token in enumerate(c.response_ids):
            if c.response_mask is None or c.response_mask[t]:
                p, q = (torch.log_softmax(lm(ids[:, : start + t]).logits[0, -1].double(), -1) for lm in lms)
                slow += (p - q)[token].item()
                slow_exact += (p.exp() * (p - q)).sum().item()
        assert (found, found_exact) == pytest.approx((slow, slow_exact), abs=1e-3)


def test_cut_counts_the_tokens_of_the_model_and_keeps_those_of_the_environment_before_it(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole = [replace(c, response=tokenizer.decode(c.response_ids, skip_special_tokens=True)) for c in ROWS]
    (long, short), _ = cut_to_equal_length(whole[:2], [whole[2], whole[1]], tokenizer, (0,))
    assert long.response_ids == [7, 8, 9, 10]  # 7 and 10 are the model's, of which the other response has two
    assert long.response_mask == [True, False, False, True]
    assert long.response == tokenizer.decode([7, 8, 9, 10])
    assert short.response_ids == [12, 13, 14, 15]
    one = cut_to_equal_length(whole[:1], [completion([1], [2, 0])], tokenizer, (0,))[0][0]
    assert one.response_ids == [7]  # not the tokens of the environment that follow


def test_curve_of_validation_counts_tokens_of_the_model_and_leaves_failures_out() -> None:
    turns = (ResponseTurn(speaker="model", start=0, stop=2, text="a"),)
    one = ValidationSample(
        iteration=1,
        num_rollouts=4,
        prompt=ROWS[0].prompt,
        prompt_ids=[1],
        response_ids=[2, 3, 4, 5],
        response="a",
        truncated=False,
        score=1.0,
        kl=0.5,
        response_mask=[True, False, False, True],
        turns=turns,
    )
    failed = replace(one, score=-9.0, kl=7.0, truncated=True, failure="timed out")
    (row,) = judge_curve([one, failed], [])
    assert (row["length"], row["reward"], row["kl"], row["eos_rate"]) == (2.0, 1.0, 0.5, 1.0)
