from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from components.rlhf.data.records import Completion, PreferencePair, Prompt
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.reward_model import RewardModelScorer, as_completion, pair_accuracy, pair_scores


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def scorer_of(folder: Path, *, microbatch_tokens: int, mean: float = 0.0, std: float = 1.0) -> RewardModelScorer:
    lm = load_scalar_lm(folder, num_frozen_layers=0, dtype=torch.float32, seed=0)
    with torch.no_grad():
        lm.score.weight.mul_(30)
    model = ScalarModel(lm, num_frozen_layers=0, dtype=torch.float32, mean=mean, std=std)
    return RewardModelScorer(model, microbatch_tokens=microbatch_tokens)


def completion(prompt_ids: list[int], response_ids: list[int]) -> Completion:
    return Completion(
        prompt=Prompt(prompt=""),
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        response="",
        logprobs=None,
        truncated=False,
    )


COMPLETIONS = [
    completion([5, 6, 7], [3, 0]),
    completion([8], [1, 0, 3, 4, 5, 0]),
    completion([9, 10, 11, 12, 13], [7]),
    completion([9, 10], [7, 7, 7, 7, 0]),
]


def test_score_is_computed_at_the_last_token(tiny_model: Path) -> None:
    scorer = scorer_of(tiny_model, microbatch_tokens=1000, mean=0.5, std=2.0)
    lm = scorer.model.lm
    expected = []
    for c in COMPLETIONS:
        hidden = lm.model(torch.tensor([c.prompt_ids + c.response_ids])).last_hidden_state[0, -1]
        expected.append(((hidden @ lm.score.weight[0]).item() - 0.5) / 2)
    scores = scorer.score(COMPLETIONS)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.parametrize("microbatch_tokens", [1, 7, 14, 20])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2]])
def test_scores_do_not_depend_on_order_or_microbatches(
    tiny_model: Path, microbatch_tokens: int, order: list[int]
) -> None:
    expected = scorer_of(tiny_model, microbatch_tokens=1000).score(COMPLETIONS)[order]
    scores = scorer_of(tiny_model, microbatch_tokens=microbatch_tokens).score([COMPLETIONS[i] for i in order])
    assert torch.allclose(scores, expected, atol=1e-5)


def test_scorer_respects_microbatch_tokens(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = scorer_of(tiny_model, microbatch_tokens=14)
    seen: list[tuple[int, ...]] = []
    plain = scorer.model.scores
    monkeypatch.setattr(scorer.model, "scores", lambda batch: seen.append(tuple(batch.input_ids.shape)) or plain(batch))
    scorer.score(COMPLETIONS)
    assert sum(rows for rows, _ in seen) == 4
    assert len(seen) > 1
    assert all(rows * width <= 14 for rows, width in seen)


def test_no_completions_give_no_scores(tiny_model: Path) -> None:
    assert scorer_of(tiny_model, microbatch_tokens=10).score([]).tolist() == []


PAIR = PreferencePair(prompt="ab", chosen="cde", rejected="x")


def test_human_text_ends_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    c = as_completion(tokenizer, PAIR, "cde", max_tokens=100)
    assert c.prompt_ids == tokenizer("ab")["input_ids"]
    assert c.response_ids == [*tokenizer("cde")["input_ids"], 0]
    assert (c.response, c.truncated, c.logprobs, c.prompt.prompt) == ("cde", False, None, "ab")


def test_incomplete_text_has_no_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    c = as_completion(tokenizer, PAIR, "cde", max_tokens=100, complete=False)
    assert c.response_ids == tokenizer("cde")["input_ids"]
    assert c.truncated


@pytest.mark.parametrize("complete", [True, False])
def test_truncated_text_has_no_eos(tokenizer: PreTrainedTokenizerBase, complete: bool) -> None:
    c = as_completion(tokenizer, PAIR, "cdefg", max_tokens=5, complete=complete)
    assert c.response_ids == tokenizer("cde")["input_ids"]
    assert (c.response, c.truncated) == ("cde", True)


class LengthScorer:
    """Scores a response by its number of tokens."""

    def __init__(self) -> None:
        self.seen: list[Completion] = []

    def score(self, completions: Sequence[Completion]) -> Tensor:
        self.seen += completions
        return torch.tensor([float(len(c.response_ids)) for c in completions])


def pair(chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt="a prompt", chosen=chosen, rejected=rejected)


def test_tie_counts_as_half(tokenizer: PreTrainedTokenizerBase) -> None:
    correct, wrong, tie = pair("longer", "short"), pair("short", "longer"), pair("same", "even")

    def accuracy(*pairs: PreferencePair) -> float:
        return pair_accuracy(*pair_scores(LengthScorer(), pairs, tokenizer, max_tokens=100))

    assert accuracy(correct) == 1
    assert accuracy(wrong) == 0
    assert accuracy(tie) == 0.5
    assert accuracy(correct, wrong, tie, correct) == 2.5 / 4


def test_texts_are_scored_in_the_form_of_responses(tokenizer: PreTrainedTokenizerBase) -> None:
    scorer = LengthScorer()
    pair_scores(scorer, [pair("yes", "no")], tokenizer, max_tokens=100)
    assert [(c.prompt.prompt, c.response, c.truncated) for c in scorer.seen] == [
        ("a prompt", "yes", False),
        ("a prompt", "no", False),
    ]
    assert all(c.response_ids[-1] == 0 for c in scorer.seen)
    incomplete = LengthScorer()
    pair_scores(incomplete, [pair("yes", "no")], tokenizer, max_tokens=100, complete=False)
    assert all(c.truncated and c.response_ids[-1] != 0 for c in incomplete.seen)
