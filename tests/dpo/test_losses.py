"""The loss and the rewards that the settings name, on TRL's numbers, and the mismatched answers of KTO."""

from pathlib import Path
from typing import Any

import pytest
import torch

from components.dpo.examples import Examples, Mismatches
from components.dpo.losses import Answers, answer_losses, pair_losses, rewards_of
from components.dpo.report import means
from components.rlhf.config.dpo import DpoConfig
from components.rlhf.maths.preferences import kl_of_mismatches
from tests.golden.cases import Case, all_cases
from tests.support.dpo_runs import examples_of

CASES = {name: case for name, case in all_cases().items() if case.family == "preferences"}


def config_of(case: Case) -> DpoConfig:
    names = {"gamma": "simpo_gamma"}
    return DpoConfig(**{names.get(name, name): value for name, value in case.params.items()})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_and_rewards_equal_those_of_trl(case: Case) -> None:
    config, mask = config_of(case), case.mask()
    logprobs, reference = (torch.where(mask, case.floats(name), 0).sum(1) for name in ("logp", "ref_logp"))
    answers = Answers(logprobs=logprobs, ref_logprobs=reference, lengths=mask.sum(1))
    rewards = rewards_of(config, answers)
    expected: dict[str, Any] = case.expected
    if config.is_paired:
        losses, (chosen, rejected) = pair_losses(config, answers), rewards.chunk(2)
        assert losses.tolist() == pytest.approx(expected["losses"], rel=1e-9, abs=1e-9)
    else:
        mismatched = case.floats("mismatched_logp") - case.floats("mismatched_ref_logp")
        is_desirable = case.mask("label")
        losses = answer_losses(config, answers, is_desirable, kl_of_mismatches(mismatched.sum(), 4))
        chosen, rejected = rewards[is_desirable], rewards[~is_desirable]
    assert losses.mean().item() == pytest.approx(expected["loss"], rel=1e-9, abs=1e-9)
    for name, values in (("rewards_chosen", chosen), ("rewards_rejected", rejected)):
        if name in expected:
            assert values.mean().item() == pytest.approx(expected[name], rel=1e-9)


def test_losses_of_pairs_and_of_answers_are_not_confused() -> None:
    answers = Answers(logprobs=torch.zeros(2), ref_logprobs=torch.zeros(2), lengths=torch.ones(2))
    with pytest.raises(ValueError, match="not one of pairs"):
        pair_losses(DpoConfig(loss="kto"), answers)


def test_mismatches_move_the_answers_of_a_step_on_by_one(tiny_model: Path) -> None:
    texts = examples_of(tiny_model, "kto")[0].texts
    steps = [[3, 0, 2], [1], [2, 3]]
    found = Mismatches(texts, steps, max_tokens=64)
    pairs = [
        (3, 2),
        (0, 3),
        (2, 0),
        (1, 2),
        (2, 3),
        (3, 2),
    ]  # prompt and answer; the only record of a step gets the one before it
    assert [(text.prompt_ids, text.response_ids) for text in found] == [
        (texts[prompt].prompt_ids, texts[answer].response_ids) for prompt, answer in pairs
    ]
    assert [list(found.of_step(step)) for step in (1, 2, 3)] == [[0, 1, 2], [3], [4, 5]]
    assert found.num_tokens == [text.num_tokens for text in found]
    assert found.num_learned == [text.num_learned for text in found]


def test_mismatches_stay_within_max_tokens(tiny_model: Path) -> None:
    texts = examples_of(tiny_model, "kto")[0].texts
    limit = max(texts.num_tokens) - 2
    found = Mismatches(texts, [list(range(len(texts)))], max_tokens=limit)
    assert [text.num_tokens for text in found] == found.num_tokens
    assert max(found.num_tokens) == limit


def test_texts_of_pairs_are_first_all_chosen_ones() -> None:
    texts: Any = type("Texts", (), {"num_tokens": [1, 2, 3, 4, 5, 6], "__len__": lambda self: 6})()
    pairs = Examples(texts=texts)
    assert len(pairs) == 3 and pairs.texts_of([2, 0]) == [4, 0, 5, 1] and pairs.num_tokens == [3, 7, 11]
    answers = Examples(texts=texts, labels=[True] * 6)
    assert len(answers) == 6 and answers.texts_of([2, 0]) == [2, 0] and answers.num_tokens == texts.num_tokens


def test_curve_of_the_report_has_means_of_neighbors() -> None:
    points = [(step, float(step)) for step in range(1, 9)]
    assert means(points, 4) == [(1.5, 1.5), (3.5, 3.5), (5.5, 5.5), (7.5, 7.5)]
    assert means([], 4) == []
