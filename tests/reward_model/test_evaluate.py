from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from components.reward_model.calibration import calibrate, cut_to_half, sample_responses
from components.reward_model.evaluate import calibrate_and_measure
from components.rlhf.data.records import Completion, PreferencePair, Prompt
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.loading import load_scalar_lm, reward_normalization
from components.rlhf.models.saving import save_model
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.reward_model import RewardModelScorer
from components.rlhf.text.errors import InputError
from tests.support.reward_model_runs import HELDOUT, PAIRS, config_of, trainer_of

PROMPTS = [Prompt(prompt=text, id=text) for text in ("It is", "It was", "We saw", "This", "A", "So")]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


class Fixed:
    """Returns the given scores in order."""

    def __init__(self, *scores: float) -> None:
        self.scores = torch.tensor(scores)

    def score(self, completions: Sequence[Completion]) -> Tensor:
        return self.scores[: len(completions)]


def answers(number: int) -> list[Completion]:
    one = Completion(
        prompt=Prompt(prompt="a"), prompt_ids=[1], response_ids=[2], response="", logprobs=None, truncated=False
    )
    return [one] * number


def test_calibration_is_mean_and_standard_deviation() -> None:
    assert calibrate(Fixed(1.0, 2.0, 6.0), answers(3)) == pytest.approx((3.0, 7**0.5))


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_2_samples_leave_raw_scores(number: int) -> None:
    assert calibrate(Fixed(5.0), answers(number)) == (0.0, 1.0)


@pytest.mark.parametrize("scores", [(2.0, 2.0, 2.0), (float("nan"), 1.0, 2.0)])
def test_constant_scores_are_refused(scores: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="the same score"):
        calibrate(Fixed(*scores), answers(3))


def test_cut_to_half_keeps_half_of_the_shorter_text(tokenizer: PreTrainedTokenizerBase) -> None:
    pair = PreferencePair(prompt="a", chosen="abcdefgh", rejected="12345")
    cut = cut_to_half(tokenizer, pair, max_tokens=100)  # the shorter one has 6 tokens with its EOS
    assert (cut.prompt, cut.chosen, cut.rejected) == ("a", "abc", "123")


def test_cut_to_half_keeps_at_least_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    cut = cut_to_half(tokenizer, PreferencePair(prompt="a", chosen="xyz", rejected="z"), max_tokens=100)
    assert (cut.chosen, cut.rejected) == ("x", "z")


def test_samples_are_one_per_prompt_and_reproducible(tiny_model: Path) -> None:
    config = config_of(num_calibration_samples=5)
    found = [sample_responses(config.model_copy(update={"seed": s}), tiny_model, PROMPTS) for s in (1, 1, 2)]
    ids = [[c.response_ids for c in responses] for responses in found]
    assert ids[0] == ids[1] != ids[2]
    assert [c.prompt for c in found[0]] == PROMPTS[:5]
    assert all(1 <= len(row) <= 6 for row in ids[0])


def measured(folder: Path, model: ScalarModel, tokenizer: PreTrainedTokenizerBase, **settings: int) -> dict[str, float]:
    config = config_of(**settings)
    responses = sample_responses(config, folder, PROMPTS * 3)
    numbers, margins = calibrate_and_measure(
        model,
        config.reward_model.training,
        tokenizer,
        pairs=HELDOUT,
        responses=responses,
        max_tokens=64,
        group=SINGLE_PROCESS,
    )
    right = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
    assert numbers["heldout_accuracy"] == pytest.approx(sum(right) / len(right))
    return numbers


def test_scores_of_the_sft_model_have_mean_0_and_std_1(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model, num_epochs=8)
    trainer.train(tokenizer, PAIRS, max_tokens=64)
    stage = config_of()
    numbers = measured(tiny_model, trainer.model, tokenizer)
    assert numbers["num_calibration_samples"] == 16
    assert numbers["num_heldout_pairs"] == len(HELDOUT)
    assert 0.5 < numbers["heldout_accuracy"] <= 1
    assert 0 <= numbers["heldout_accuracy_cut"] <= 1
    # PPO loads the artifact and normalizes by its mean and std, so its first scores are standardized.
    save_model(trainer.model.lm, tokenizer, tmp_path, dtype=torch.float32)
    mean, std = reward_normalization(tmp_path)
    assert (mean, std) == (numbers["reward_mean"], numbers["reward_std"])
    lm = load_scalar_lm(tmp_path, num_frozen_layers=0, dtype=torch.float32)
    loaded = ScalarModel(lm, num_frozen_layers=0, dtype=torch.float32, mean=mean, std=std)
    responses = sample_responses(stage, tiny_model, PROMPTS * 3)
    scores = RewardModelScorer(loaded, microbatch_tokens=64).score(responses)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    assert (lm.config.head_name, lm.config.padding_side) == ("score", "right")


def test_no_samples_leave_raw_scores(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = trainer_of(tiny_model).model
    numbers = measured(tiny_model, model, tokenizer, num_calibration_samples=0)
    assert (numbers["reward_mean"], numbers["reward_std"]) == (0.0, 1.0)
    assert (model.mean, model.std) == (0.0, 1.0)


def test_normalization_does_not_change_the_accuracy(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    names = ("heldout_accuracy", "heldout_accuracy_cut")
    found = []
    for samples in (0, 16):
        numbers = measured(tiny_model, trainer_of(tiny_model).model, tokenizer, num_calibration_samples=samples)
        found.append([numbers[name] for name in names])
    assert found[0] == found[1]
