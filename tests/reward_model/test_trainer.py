import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from components.reward_model.evaluate import as_markdown
from components.reward_model.trained import train_and_measure
from components.reward_model.trainer import EncodedPair, RewardModelTrainer
from components.rlhf.config.model import LoraConfig
from components.rlhf.data.datasets import save_records
from components.rlhf.data.records import PreferencePair
from components.rlhf.data.token_files import pack, save_tokens
from components.rlhf.data.tokenizer import EncodedText, encode_record
from components.rlhf.text.errors import InputError
from tests.support.reward_model_runs import PAIRS, config_of, trainer_of
from tests.support.training import break_after_saving, checkpoints_every_step, context_of

# Tokens of a pair's two responses: unequal, equal, and one too short to share a cut of 3.
SIZES = [(5, 3), (4, 4), (6, 2), (1, 1)]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def train(trainer: RewardModelTrainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    return trainer.train(tokenizer, PAIRS, max_tokens=64)


def weights(trainer: RewardModelTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def encoded_pairs(*, margins: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)) -> list[EncodedPair]:
    """Pairs of the sizes above, of arbitrary tokens."""

    def text(prompt: list[int], size: int, start: int) -> EncodedText:
        return EncodedText(
            prompt_ids=prompt,
            response_ids=list(range(start, start + size)),
            response_mask=[True] * size,
            truncated=False,
        )

    return [
        EncodedPair(
            chosen=text([5, 6, 7][: 1 + number % 3], a, 10 + 20 * number),
            rejected=text([5, 6, 7][: 1 + number % 3], b, 110 + 20 * number),
            margin=margins[number],
        )
        for number, (a, b) in enumerate(SIZES)
    ]


def scaled(trainer: RewardModelTrainer) -> RewardModelTrainer:
    """With a head that gives clearly different scores."""
    with torch.no_grad():
        trainer.model.lm.score.weight.mul_(30)
    return trainer


def losses_of(trainer: RewardModelTrainer, pairs: list[EncodedPair]) -> tuple[Tensor, Tensor]:
    return trainer.losses(trainer.score_prefixes(pairs))


def slow_loss(lm: Any, pair: EncodedPair, *, prefix_loss: float, least: int) -> float:
    """One text and one cut at a time."""

    @torch.no_grad()
    def score(text: EncodedText, length: int) -> float:
        ids = torch.tensor([text.prompt_ids + text.response_ids[:length]])
        return float(lm.model(ids).last_hidden_state[0, -1] @ lm.score.weight[0])

    def loss(a: float, b: float) -> float:
        return math.log1p(math.exp(b - a))

    sizes = len(pair.chosen.response_ids), len(pair.rejected.response_ids)
    whole = loss(score(pair.chosen, sizes[0]), score(pair.rejected, sizes[1]) + pair.margin)
    total, weight = 0.0, 0
    for cut in range(least, min(sizes) + 1):
        total += cut * loss(score(pair.chosen, cut), score(pair.rejected, cut))
        weight += cut
    return (1 - prefix_loss) * whole + prefix_loss * total / weight if weight else whole


@pytest.mark.parametrize("prefix_loss", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("least", [1, 3])
def test_losses_equal_a_double_loop(tiny_model: Path, prefix_loss: float, least: int) -> None:
    trainer = scaled(trainer_of(tiny_model, prefix_loss=prefix_loss, min_prefix_tokens=least))
    pairs = encoded_pairs(margins=(0.0, 0.5, 0.0, 1.5))
    losses, wins = losses_of(trainer, pairs)
    expected = [slow_loss(trainer.model.lm, p, prefix_loss=prefix_loss, least=least) for p in pairs]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)
    assert losses.std() > 0.01
    plain = [slow_loss(trainer.model.lm, p, prefix_loss=0.0, least=1) for p in encoded_pairs()]
    assert wins.tolist() == [loss < math.log(2) for loss in plain]
    assert not wins.requires_grad


def test_losses_do_not_depend_on_the_other_pairs(tiny_model: Path) -> None:
    trainer, pairs = scaled(trainer_of(tiny_model)), encoded_pairs()
    together = losses_of(trainer, pairs)[0].tolist()
    assert [losses_of(trainer, [pair])[0].item() for pair in pairs] == pytest.approx(together, abs=1e-5)
    assert losses_of(trainer, pairs[::-1])[0].tolist() == pytest.approx(together[::-1], abs=1e-5)


def test_equal_texts_have_a_loss_of_log_2(tiny_model: Path) -> None:
    text = encoded_pairs()[0].chosen
    losses, _ = losses_of(trainer_of(tiny_model), [EncodedPair(chosen=text, rejected=text, margin=0.0)])
    assert losses.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("use", "expected"), [(True, [2.5, 0.0]), (False, [0.0, 0.0])])
def test_margins_are_used_only_with_use_margin(tiny_model: Path, use: bool, expected: list[float]) -> None:
    trainer = trainer_of(tiny_model, use_margin=use)
    pairs = [PreferencePair(prompt="a", chosen="b", rejected="c", margin=margin) for margin in (2.5, None)]
    assert [trainer.margin_of(pair) for pair in pairs] == expected


def test_training_learns_the_pairs(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, num_epochs=8)
    assert train(trainer, tokenizer) == {"num_steps": 24.0}
    rows = trainer.context.tracker.rows
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=0.1)  # a new head scores nearly at random
    assert rows[24]["train/loss"] < 0.3
    assert rows[24]["train/accuracy"] == 1.0


def test_frozen_layers_do_not_change(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, frozen=2)
    before = weights(trainer)
    train(trainer, tokenizer)
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    trained = ("lm.model.layers.2.", "lm.model.norm.", "lm.score.")
    assert moved == {name for name in before if name.startswith(trained)}


def test_microbatches_do_not_change_training(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    runs, rows = [], []
    for budget in (4096, 60, 1):
        trainer = trainer_of(tiny_model, training={"microbatch_tokens": budget, "learning_rate": 1e-3})
        train(trainer, tokenizer)
        runs.append(weights(trainer))
        rows.append(trainer.context.tracker.rows[1])
        del rows[-1]["train/computed_per_real_token"]
    start = weights(trainer_of(tiny_model))
    moved = max((runs[0][name] - start[name]).abs().max() for name in start)
    for other, row in zip(runs[1:], rows[1:], strict=True):
        assert row == pytest.approx(rows[0], rel=1e-4)
        assert max((other[name] - runs[0][name]).abs().max() for name in start) < 0.02 * moved


@pytest.mark.parametrize(("limit", "passes"), [(sys.maxsize, [[0, 1, 2, 3]]), (0, [[0, 3], [1, 2]])])
def test_texts_of_a_pair_are_not_padded_to_each_other(tiny_model: Path, limit: int, passes: list[list[int]]) -> None:
    """Packed, or in passes of texts of similar length; the gradient is that of one padded pass."""
    trainer = scaled(trainer_of(tiny_model, training={"microbatch_tokens": 4096}))
    trainer.model.pack_limit = limit
    ids = torch.randint(1, 200, (4, 300), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [
        EncodedText(
            prompt_ids=row[:3], response_ids=row[3:length], response_mask=[True] * (length - 3), truncated=False
        )
        for row, length in zip(ids, (300, 20, 290, 25), strict=True)
    ]
    pairs = [
        EncodedPair(chosen=texts[0], rejected=texts[1], margin=0.0),
        EncodedPair(chosen=texts[3], rejected=texts[2], margin=0.0),
    ]
    scored = trainer.score_prefixes(pairs)
    assert sorted(map(sorted, scored.passes)) == passes  # chosen of 300 and 25 tokens, rejected of 20 and 290
    trainer.model.pack_limit = 0
    gradients = []
    for scores in (scored.scores, trainer.model.prefix_scores(scored.batch)):
        trainer.model.zero_grad()
        trainer.losses(replace(scored, scores=scores))[0].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name


def test_new_head_depends_on_the_seed(tiny_model: Path) -> None:
    heads = [trainer_of(tiny_model).model.lm.score.weight for _ in range(2)]
    assert torch.equal(heads[0], heads[1])


def test_adapters_learn_the_pairs_with_the_head(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, frozen=1, lora=LoraConfig(rank=8), num_epochs=8)
    before = weights(trainer)
    train(trainer, tokenizer)
    rows = trainer.context.tracker.rows
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=0.1)
    assert rows[24]["train/loss"] < 0.3
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".lora_" in name or name == "lm.score.weight"}


def test_adapters_start_at_the_loss_of_the_plain_model(tiny_model: Path) -> None:
    losses = [
        losses_of(trainer_of(tiny_model, lora=lora), encoded_pairs())[0].tolist() for lora in (None, LoraConfig())
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_stored_ids_give_the_same_weights(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_records(tmp_path, "train", PAIRS)
    texts = [text for pair in PAIRS for text in encode_record(pair, tokenizer, max_tokens=12)]
    save_tokens(tmp_path, "train", [pack(text) for text in texts], tokenizer, max_tokens=12)
    plain, stored = trainer_of(tiny_model), trainer_of(tiny_model)
    plain.train(tokenizer, PAIRS, max_tokens=12)
    monkeypatch.setattr("components.rlhf.data.token_files.pack", None)  # nothing is encoded
    stored.train(tokenizer, PAIRS, max_tokens=12, folder=tmp_path)
    assert all(torch.equal(weight, weights(plain)[name]) for name, weight in weights(stored).items())
    assert stored.context.tracker.rows == plain.context.tracker.rows


def test_stage_reads_the_stored_ids(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_records(tmp_path, "train", PAIRS)
    texts = [text for pair in PAIRS for text in encode_record(pair, tokenizer, max_tokens=64)]
    save_tokens(tmp_path, "train", [pack(text) for text in texts], tokenizer, max_tokens=64)
    monkeypatch.setattr("components.rlhf.data.token_files.pack", None)  # nothing is encoded
    monkeypatch.setattr("components.reward_model.trained.calibrate_and_measure", lambda *_, **__: ({}, []))
    context, config = context_of("reward_model"), config_of()
    result = train_and_measure(tiny_model, config, tiny_model, PAIRS, {"max_tokens": 64}, context, tmp_path)
    assert result.numbers == {"num_steps": 6.0}


@pytest.mark.parametrize("interrupt_at", [2, 5])
def test_resumed_run_equals_an_uninterrupted_one(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, interrupt_at: int
) -> None:
    undisturbed = trainer_of(tiny_model)
    expected = train(undisturbed, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train(
            trainer_of(
                tiny_model, checkpoints=checkpoints_every_step(tmp_path, "reward_model"), interrupt_at=interrupt_at
            ),
            tokenizer,
        )
    resumed = trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "reward_model"))
    assert train(resumed, tokenizer) == expected
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(resumed).items())
    assert resumed.context.tracker.rows == {
        step: undisturbed.context.tracker.rows[step] for step in range(interrupt_at, 7)
    }


def test_non_finite_loss_names_step_and_pairs(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, training={"learning_rate": 1e30, "warmup_fraction": 0.0})
    with pytest.raises(InputError, match=r"(loss|grad_norm) is (nan|inf) at step 2 \(pairs \[\d") as error:
        train(trainer, tokenizer)
    assert "no checkpoint had been saved yet" in str(error.value)
    assert "Lower the learning rate" in str(error.value)


def test_non_finite_loss_names_the_latest_checkpoint(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "reward_model"))
    break_after_saving(trainer.context.checkpoints, step=2, weight=trainer.model.lm.score.weight)
    with pytest.raises(InputError, match="is nan at step 3") as error:
        train(trainer, tokenizer)
    assert f"the latest checkpoint is {tmp_path}/reward_model/x/step-00000002" in str(error.value)


def test_summary_states_the_heldout_accuracy() -> None:
    text = as_markdown(
        {
            "num_heldout_pairs": 250.0,
            "heldout_accuracy": 0.678,
            "heldout_accuracy_cut": 0.55,
            "num_calibration_samples": 128.0,
            "reward_mean": -0.25,
            "reward_std": 1.5,
        }
    )
    for shown in ("250 held-out human pairs", "**67.8%**", "55.0% with both cut", "128 responses", "-0.250", "1.500"):
        assert shown in text
