import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.dpo.trainer import DpoTrainer
from components.rlhf.config.model import LoraConfig
from components.rlhf.data.batching import epoch_order
from components.rlhf.data.datasets import save_records
from components.rlhf.data.token_files import pack, save_tokens
from components.rlhf.data.tokenizer import encode_record, load_tokenizer
from components.rlhf.text.errors import InputError
from tests.support.dpo_runs import LABELED, LOSSES, PAIRS, examples_of, train, trainer_of
from tests.support.training import break_after_saving, checkpoints_every_step

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)


def weights(trainer: DpoTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.actor.named_parameters()}


class SlowModel:
    """Log-probs of one text at a time, with transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.lm, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)

    def logprobs(self, prompt: str, answer: str) -> Tensor:
        """Of each token of the answer and its end."""
        ids = self.tokenizer(prompt)["input_ids"]
        rest = [*self.tokenizer(answer)["input_ids"], self.tokenizer.eos_token_id]
        logprobs = torch.log_softmax(self.lm(torch.tensor([ids + rest])).logits[0], dim=-1)
        return torch.stack([logprobs[len(ids) - 1 + t, token] for t, token in enumerate(rest)])


def slow_losses(loss: str, now: SlowModel, before: SlowModel, order: list[int]) -> list[Tensor]:
    """The loss of the records in this order, which are one step."""

    def values(prompt: str, answer: str) -> tuple[Tensor, Tensor, int]:
        policy, reference = now.logprobs(prompt, answer), before.logprobs(prompt, answer).detach()
        return policy.sum(), policy.sum() - reference.sum(), len(policy)

    if loss == "kto":
        records = [LABELED[row] for row in order]
        others = [records[-1], *records[:-1]]
        ratios = [values(r.prompt, other.completion)[1].item() for r, other in zip(records, others, strict=True)]
        kl = max(sum(ratios) / len(ratios), 0.0)
        found = []
        for record in records:
            sign, weight = (1, 1.5) if record.is_desirable else (-1, 1.0)
            gain = sign * (values(record.prompt, record.completion)[1] - kl)
            found.append(weight * (1 - torch.sigmoid(0.1 * gain)))
        return found
    found = []
    for pair in (PAIRS[row] for row in order):
        (p1, d1, n1), (p2, d2, n2) = (values(pair.prompt, text) for text in (pair.chosen, pair.rejected))
        right, wrong = (torch.nn.functional.logsigmoid(sign * 0.1 * (d1 - d2)) for sign in (1, -1))
        found.append(
            {
                "dpo": -right,
                "ipo": (d1 / n1 - d2 / n2 - 5) ** 2,
                "cdpo": -0.9 * right - 0.1 * wrong,
                "robust": (-0.9 * right + 0.1 * wrong) / 0.8,
                "simpo": -torch.nn.functional.logsigmoid(2.0 * (p1 / n1 - p2 / n2) - 1.0),
            }[loss]
        )
    return found


def slow_kl(loss: str, now: SlowModel, before: SlowModel) -> float:
    """Half the squared log-ratios, mean over all texts that are trained on."""
    texts = [(pair.prompt, text) for pair in PAIRS for text in (pair.chosen, pair.rejected)]
    if loss == "kto":
        texts = [(answer.prompt, answer.completion) for answer in LABELED]
    log_ratios = [(now.logprobs(*text) - before.logprobs(*text)).detach().tolist() for text in texts]
    return sum(d**2 / 2 for row in log_ratios for d in row) / len(texts)


@EVERY_LOSS
@pytest.mark.parametrize("microbatch_tokens", [4096, 40])
def test_step_takes_the_mean_over_its_records(tiny_model: Path, loss: str, microbatch_tokens: int) -> None:
    """Loss and gradient of the second of two steps, in which policy and reference differ, against a loop over texts."""
    trainer = trainer_of(
        tiny_model,
        loss,
        batch_size=20,
        training={"microbatch_tokens": microbatch_tokens, "max_grad_norm": 0.0, "warmup_fraction": 0.0},
    )
    before, now = SlowModel(tiny_model), SlowModel(tiny_model)
    step = trainer.context.tracker.log

    def look(metrics: Any, number: int) -> None:
        step(metrics, number)
        if number == 1:  # the weights after the first step
            now.lm.load_state_dict({n.removeprefix("lm."): p for n, p in weights(trainer).items()}, strict=False)

    trainer.context.tracker.log = look  # type: ignore[method-assign]
    numbers = trainer.train(*examples_of(tiny_model, loss), max_tokens=64)
    assert numbers["num_steps"] == 2
    order = epoch_order(len(LABELED if loss == "kto" else PAIRS), seed=3, epoch=1)
    expected = torch.stack(slow_losses(loss, now, before, order)).mean()
    gradients = torch.autograd.grad(expected, list(now.lm.parameters()))
    row = trainer.history[1]
    assert row["loss"] == pytest.approx(expected.item(), rel=2e-4, abs=1e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert row["grad_norm"] == pytest.approx(norm, rel=2e-3, abs=1e-6)
    if loss != "simpo":
        assert row["kl"] == pytest.approx(slow_kl(loss, now, before), rel=2e-3)
    assert trainer.context.tracker.rows[2]["train/loss"] == row["loss"]


@EVERY_LOSS
def test_training_orders_the_held_out_pairs(tiny_model: Path, loss: str) -> None:
    trainer = trainer_of(tiny_model, loss, num_epochs=4)
    numbers = train(trainer, tiny_model)
    first, last = trainer.history[0], trainer.history[-1]
    assert last["loss"] < first["loss"] and last["accuracy"] == 1.0
    assert numbers["heldout_accuracy"] == 1.0 and numbers["num_heldout_pairs"] == 3
    assert numbers["heldout_margin"] > 1
    assert ("heldout_kl" in numbers) == ("kl" in last) == (loss != "simpo")
    assert ("kl/mismatched" in last) == (loss == "kto")
    assert [row["step"] for row in trainer.history] == list(range(1, 13))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_first_step_starts_at_the_reference(tiny_model: Path, loss: str) -> None:
    trainer = trainer_of(tiny_model, loss, max_steps=1, batch_size=20)
    train(trainer, tiny_model)
    row = trainer.history[0]
    for name in ("margin", "rewards/chosen", "rewards/rejected", "kl"):
        assert row[name] == pytest.approx(0, abs=1e-5)
    # Half of KTO's sigmoid, times the mean weight of 6 desirable and 4 undesirable answers.
    expected = 0.5 * (6 * 1.5 + 4) / 10 if loss == "kto" else math.log(2)
    assert row["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("loss", "microbatch_tokens"), [("dpo", 1), ("ipo", 40), ("kto", 30)])
def test_microbatches_do_not_change_training(tiny_model: Path, loss: str, microbatch_tokens: int) -> None:
    runs = []
    for limit in (4096, microbatch_tokens):
        training = {"microbatch_tokens": limit, "learning_rate": 1e-3}
        trainer = trainer_of(tiny_model, loss, num_epochs=1, training=training)
        train(trainer, tiny_model)
        runs.append(trainer)
    start = weights(trainer_of(tiny_model))
    first, second = map(weights, runs)
    moved = max((first[name] - start[name]).abs().max() for name in start)
    assert max((first[name] - second[name]).abs().max() for name in start) < 0.02 * moved
    other = ("computed_per_real_token", "accuracy")  # in the first step all rewards are 0, but for rounding
    rows = [{name: value for name, value in run.history[0].items() if name not in other} for run in runs]
    assert rows[1] == pytest.approx(rows[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"frozen": 1}, {"lora": LoraConfig(rank=4)}])
def test_rows_that_are_not_packed_train_alike(tiny_model: Path, settings: dict[str, Any]) -> None:
    runs = []
    for limit in (None, 0):
        trainer = trainer_of(tiny_model, training={"learning_rate": 1e-3}, **settings)
        trainer.actor.pack_limit = trainer.actor.pack_limit if limit is None else limit
        train(trainer, tiny_model)
        runs.append([row["loss"] for row in trainer.history])
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_frozen_layers_do_not_change_and_are_computed_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    trainers = []
    for limit in (2**30, 0):
        monkeypatch.setattr("components.dpo.states.MAX_BYTES", limit)
        trainer = trainer_of(tiny_model, loss, frozen=2, num_epochs=3, training={"learning_rate": 1e-3})
        before = weights(trainer)
        computed: list[int] = []
        trunk = trainer.actor.trunk
        trainer.actor.trunk = lambda batch, trunk=trunk, seen=computed: seen.append(len(batch)) or trunk(batch)  # type: ignore[method-assign]
        train(trainer, tiny_model)
        moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
        assert moved == {name for name in before if name.startswith(("lm.model.layers.2.", "lm.model.norm."))}
        trainers.append(trainer)
        texts = 6 + (
            len(LABELED) * (1 + 3) if loss == "kto" else 2 * len(PAIRS)
        )  # those of kto's mismatches differ by epoch
        assert sum(computed) == texts if limit else sum(computed) > 2 * texts
    assert [row["loss"] for row in trainers[1].history] == pytest.approx(
        [row["loss"] for row in trainers[0].history], rel=1e-4
    )


def test_adapters_learn_and_leave_the_model_unchanged(tiny_model: Path) -> None:
    trainer = trainer_of(tiny_model, frozen=1, lora=LoraConfig(rank=8), num_epochs=4)
    before = weights(trainer)
    numbers = train(trainer, tiny_model)
    assert trainer.history[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert numbers["heldout_accuracy"] == 1.0
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


@pytest.mark.parametrize(
    ("loss", "settings"),
    [*((loss, {}) for loss in LOSSES), *((loss, {"frozen": 1, "lora": LoraConfig(rank=4)}) for loss in ("dpo", "kto"))],
)
def test_resumed_run_equals_an_uninterrupted_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, settings: dict[str, Any]
) -> None:
    undisturbed = trainer_of(tiny_model, loss, **settings)
    expected = train(undisturbed, tiny_model)
    for interrupt_at in (1, 3):  # the first step, of which nothing but the reference is saved, and a later one
        with pytest.raises(KeyboardInterrupt):
            checkpoints = checkpoints_every_step(tmp_path, "dpo")
            train(
                trainer_of(tiny_model, loss, checkpoints=checkpoints, interrupt_at=interrupt_at, **settings), tiny_model
            )
        if interrupt_at == 1 and loss != "simpo":
            monkeypatch.setattr("components.dpo.reference.Reference.compute", None)  # it is not computed again
    resumed = trainer_of(tiny_model, loss, checkpoints=checkpoints_every_step(tmp_path, "dpo"), **settings)
    assert train(resumed, tiny_model) == expected
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(resumed).items())
    assert resumed.history == undisturbed.history
    assert set(resumed.context.tracker.rows) == set(range(3, 7))


def test_reference_is_computed_only_for_what_is_read(tiny_model: Path) -> None:
    trainer = trainer_of(tiny_model, max_steps=1, batch_size=2)
    train(trainer, tiny_model)
    assert trainer.reference is not None
    assert {name: len(rows) for name, rows in trainer.reference.rows.items()} == {"train": 4, "heldout": 6}
    with pytest.raises(KeyError):
        trainer.reference.of("train", range(2 * len(PAIRS)), torch.ones(18, 1, dtype=torch.bool))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_stored_ids_give_the_same_weights(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    split, records = ("labeled", LABELED) if loss == "kto" else ("train", PAIRS)
    save_records(tmp_path, split, records)
    texts = [text for record in records for text in encode_record(record, tokenizer, max_tokens=12)]
    save_tokens(tmp_path, split, [pack(text) for text in texts], tokenizer, max_tokens=12)
    plain, stored = trainer_of(tiny_model, loss), trainer_of(tiny_model, loss)
    plain.train(examples_of(tiny_model, loss, max_tokens=12)[0], None, max_tokens=12)
    examples = examples_of(tiny_model, loss, max_tokens=12, data=tmp_path)[0]
    assert examples.labels == examples_of(tiny_model, loss, max_tokens=12)[0].labels
    stored.train(examples, None, max_tokens=12)
    assert all(torch.equal(weight, weights(plain)[name]) for name, weight in weights(stored).items())


def test_non_finite_loss_names_step_and_records(tiny_model: Path) -> None:
    trainer = trainer_of(tiny_model, training={"learning_rate": 1e30, "warmup_fraction": 0.0})
    with pytest.raises(InputError, match=r"(loss|grad_norm) is (nan|inf) at step 2 \(pairs \[\d") as error:
        train(trainer, tiny_model)
    assert "Lower the learning rate" in str(error.value)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_non_finite_weights_after_the_last_step_are_an_error(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    """No training loss sees the weights after the last step, but the stage must still fail."""
    trainer = trainer_of(tiny_model, loss, max_steps=1, checkpoints=checkpoints_every_step(tmp_path, "dpo"))
    break_after_saving(trainer.context.checkpoints, step=1, weight=trainer.actor.lm.model.norm.weight)
    with pytest.raises(InputError, match=r"The held-out \w+ is nan at step 1"):
        train(trainer, tiny_model)


def test_kto_without_one_kind_in_a_step_leaves_its_metrics_out(tiny_model: Path) -> None:
    trainer = trainer_of(tiny_model, "kto", batch_size=1, num_epochs=1)
    train(trainer, tiny_model)
    for row in trainer.history:
        assert ("rewards/chosen" in row) != ("rewards/rejected" in row)
        assert "margin" not in row and math.isfinite(row["kl/mismatched"])
    assert json.loads(json.dumps(trainer.history)) == trainer.history
