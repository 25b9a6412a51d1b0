"""Responses of several turns in the evaluation: only what the model says is measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from components.evaluation.compare import compare, cut_to_equal_length, rows_without_failures, sequence_kl
from components.evaluation.judge_curve import judge_curve
from components.evaluation.report import as_html
from components.evaluation.samples import save_comparison
from components.evaluation.sampling import Sampled
from components.evaluation.verdict import Decision, summarize
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.data.records import Prompt, ResponseTurn, ValidationSample
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from tests.support.comparisons import judged_of
from tests.support.ppo_runs import completion
from tests.support.tiny_model import make_tiny_model

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


GAME = """
class Game:
    def reset(self, prompt, columns):
        self.turns, self.prompt = 0, prompt

    def step(self, text):
        self.turns += 1
        if self.prompt == "So" and len(text) > 1:
            raise ValueError("no game")
        return f" [{self.turns}] ", 1.0, self.turns == 3
"""


def test_both_models_play_and_rows_with_a_failure_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """With the same seeds and a model of its own each; the report shows who says what."""
    texts = ["It is", "We", "A film that", "So", "It", "One"]
    prompts = [Prompt(prompt=text, id=str(i)) for i, text in enumerate(texts)]
    policy = make_tiny_model(tmp_path / "policy", seed=5)
    for folder in (tiny_model, policy):
        assert load_stop_ids(folder) == (0,)
    game = {"kind": "function", "function": "mine:Game", "source": GAME, "stop": [*"aeiost "], "max_turns": 3}
    stage = EvaluationStageConfig.model_validate(
        {
            "model": {"precision": "fp32"},
            "evaluation": {},
            "sampling": {"max_new_tokens": 60, "batch_size": 4},
            "gate": {},
            "environment": game,
            "seed": 0,
        }
    )
    comparison = compare(
        stage, prompts, sft_model=tiny_model, policy=policy, reward_model=None, progress=Progress("evaluation")
    )
    assert comparison.num_failed == 1 and comparison.groups == [0, 1, 2, 4, 5]
    assert [p.id for p in comparison.prompts] == ["0", "1", "2", "4", "5"]
    for responses in (comparison.sft, comparison.policy):
        assert any(len(c.turns) > 1 for c in responses.completions)
        for c in responses.completions:
            assert not c.failure and c.environment_reward is not None
            assert [turn.text for turn in c.turns if turn.speaker == "environment"] == [" [1] ", " [2] "][
                : len(c.turns) // 2
            ]
    assert comparison.sft.completions[0].response != comparison.policy.completions[0].response
    assert all(kl > 0 for kl in comparison.exact_kl)

    judge = replace(judged_of([0.0] * 5, [1.0] * 5), consistent=[True] * 5)
    numbers = summarize(comparison, [judge], stage.evaluation, reward_accuracy=None, seed=0)
    assert numbers["num_failed"] == 1 and numbers["num_prompts"] == 5
    page = as_html(comparison, [judge], numbers, Decision(decision="promote", reason="good"), [], seed=0)
    assert "because the environment failed for one of the models: 1." in page
    assert '<div class="turn environment"><span>environment:</span>  [1] </div>' in page
    assert page.count('<div class="turn model">') > 5
    save_comparison(comparison, [judge], numbers, [], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [turn["speaker"] for turn in rows[0]["ppo"]["turns"]][:2] == ["model", "environment"]
    assert rows[0]["ppo"]["num_tokens"] == comparison.policy.completions[0].num_model_tokens


def test_no_verdict_where_the_environment_fails_for_every_prompt(tiny_model: Path) -> None:
    failed = Sampled(completions=[replace(c, failure="timed out") for c in ROWS], probe=torch.zeros(1))
    with pytest.raises(InputError, match="The environment fails for every held-out prompt"):
        rows_without_failures({"fine-tuned": failed, "PPO": failed})
