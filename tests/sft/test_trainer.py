import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import LoraConfig, ModelConfig, TrainingConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.datasets import save_dataset, save_records
from components.rlhf.data.records import Demonstration, Turn
from components.rlhf.data.token_files import pack, save_tokens
from components.rlhf.data.tokenizer import EncodedText, encode_text, encode_turns
from components.rlhf.text.errors import InputError
from components.sft.__main__ import main
from components.sft.trainer import SftTrainer, as_markdown
from tests.support.training import NEVER, break_after_saving, checkpoints_every_step, context_of

DATA = [
    Demonstration(turns=(Turn(context=prompt, answer=completion),))
    for prompt in ("It is", "We saw that it was", "A")
    for completion in (" good", " a very good film", " so")
]
HELDOUT = [
    Demonstration(turns=(Turn(context="It was", answer=" good"),)),
    Demonstration(turns=(Turn(context="This", answer=" a good film"),)),
]


def trainer_of(
    folder: Path,
    *,
    checkpoints: CheckpointManager | None = None,
    frozen: int = 0,
    lora: LoraConfig | None = None,
    interrupt_at: int = NEVER,
    **sft: Any,
) -> SftTrainer:
    training = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_fraction": 0.2, "microbatch_tokens": 64}
    defaults = {"num_epochs": 2, "batch_size": 4}
    stage = SftStageConfig(
        model=ModelConfig(num_frozen_layers=frozen, precision="fp32", lora=lora),
        sft=SftConfig(training=TrainingConfig(**(training | sft.pop("training", {}))), **(defaults | sft)),
        checkpoint=CheckpointConfig(),
        seed=3,
    )
    context = context_of("sft", checkpoints=checkpoints, interrupt_at=interrupt_at)
    return SftTrainer(stage, folder, context)


def train(trainer: SftTrainer, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    return trainer.train(tokenizer, DATA, HELDOUT, max_tokens=64)


def weights(trainer: SftTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.actor.named_parameters()}


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def encoded(tokenizer: PreTrainedTokenizerBase, max_tokens: int = 64) -> list[EncodedText]:
    return [encode_text(tokenizer, d.prompt, d.turns[0].answer, max_tokens=max_tokens) for d in DATA]


def test_loss_equals_transformers_with_prompts_ignored(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = encoded(tokenizer)
    width = max(t.num_tokens for t in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, t in enumerate(texts):
        ids[row, : t.num_tokens] = torch.tensor(t.prompt_ids + t.response_ids)
        labels[row, len(t.prompt_ids) : t.num_tokens] = torch.tensor(t.response_ids)
        mask[row, : t.num_tokens] = 1
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    expected = reference(ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    trainer = trainer_of(tiny_model)
    loss = trainer._loss(texts, denominator=sum(len(t.response_ids) for t in texts))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in trainer.actor.lm.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-6, rtol=1e-4), name


def test_loss_equals_a_loop_over_tokens(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts carry no loss, EOS does."""
    lm, total, count = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), 0.0, 0
    for d in HELDOUT:
        prompt, rest = tokenizer(d.prompt)["input_ids"], [*tokenizer(d.turns[0].answer)["input_ids"], 0]
        with torch.no_grad():
            logprobs = torch.log_softmax(lm(torch.tensor([prompt + rest])).logits[0], dim=-1)
        total -= sum(logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(rest))
        count += len(rest)
    texts = [encode_text(tokenizer, d.prompt, d.turns[0].answer, max_tokens=64) for d in HELDOUT]
    assert trainer_of(tiny_model).heldout_loss(texts) == pytest.approx(total / count, abs=1e-5)


def test_every_answer_of_a_conversation_carries_loss_and_the_turns_between_do_not(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Against a loop over the tokens of each answer, in one batch with a shorter text."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    turns = (Turn(context="ab", answer="cd"), Turn(context="efg", answer="h"))
    ids = [*tokenizer("abcd")["input_ids"], 0, *tokenizer("efgh")["input_ids"], 0]
    learned = [2, 3, 4, 8, 9]  # c, d, end, h, end
    with torch.no_grad():
        logprobs = torch.log_softmax(lm(torch.tensor([ids])).logits[0], dim=-1)
        short = torch.log_softmax(lm(torch.tensor([tokenizer("xy")["input_ids"] + [0]])).logits[0], dim=-1)
    expected = -sum(logprobs[t - 1, ids[t]].item() for t in learned) - short[0, tokenizer("y")["input_ids"][0]].item()
    expected -= short[1, 0].item()
    texts = [encode_turns(tokenizer, turns, max_tokens=64), encode_text(tokenizer, "x", "y", max_tokens=64)]
    assert [text.num_learned for text in texts] == [5, 2]
    assert trainer_of(tiny_model)._loss(texts, 1).item() == pytest.approx(expected, abs=1e-4)


def test_truncated_text_has_no_eos_in_its_loss(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    cut = encode_text(tokenizer, "ab", "cdef", max_tokens=4)
    assert cut.response_ids == tokenizer("cd")["input_ids"]
    whole = encode_text(tokenizer, "ab", "cdef", max_tokens=40)
    trainer = trainer_of(tiny_model)
    logprobs = [-trainer._loss([text], 1).item() for text in (cut, whole)]
    assert logprobs[0] > logprobs[1]  # the sum over fewer tokens


def test_heldout_loss_is_0_without_heldout_texts(tiny_model: Path) -> None:
    assert trainer_of(tiny_model).heldout_loss([]) == 0.0


def test_training_lowers_the_heldout_loss(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, num_epochs=8)
    numbers = train(trainer, tokenizer)
    assert numbers["heldout_loss"] < 0.6 * numbers["heldout_loss_before"]
    assert numbers["heldout_perplexity"] == pytest.approx(math.exp(numbers["heldout_loss"]))
    assert numbers["num_steps"] == 8 * 3  # nine texts in batches of 4, 4 and 1
    rows = trainer.context.tracker.rows
    assert set(rows) == set(range(1, 25))
    assert rows[24]["train/loss"] < 0.5 * rows[1]["train/loss"]
    assert rows[24]["heldout/loss"] == numbers["heldout_loss"]


@pytest.mark.parametrize("microbatch_tokens", [4096, 30])
def test_step_takes_the_mean_over_its_response_tokens(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, microbatch_tokens: int
) -> None:
    training = {"microbatch_tokens": microbatch_tokens, "max_grad_norm": 0.0}
    trainer = trainer_of(tiny_model, batch_size=9, max_steps=1, training=training)
    expected = trainer._loss(texts := encoded(tokenizer), sum(len(t.response_ids) for t in texts))
    gradients = torch.autograd.grad(expected, list(trainer.actor.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    train(trainer, tokenizer)
    assert trainer.context.tracker.rows[1]["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.context.tracker.rows[1]["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_frozen_layers_do_not_change(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, frozen=2)
    before = weights(trainer)
    train(trainer, tokenizer)
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if name.startswith(("lm.model.layers.2.", "lm.model.norm."))}


def test_microbatches_do_not_change_training(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    runs = []
    for budget in (4096, 40, 1):
        trainer = trainer_of(tiny_model, training={"microbatch_tokens": budget, "learning_rate": 1e-3})
        train(trainer, tokenizer)
        runs.append(weights(trainer))
    start = weights(trainer_of(tiny_model))
    moved = max((runs[0][name] - start[name]).abs().max() for name in start)
    for other in runs[1:]:
        assert max((other[name] - runs[0][name]).abs().max() for name in start) < 0.02 * moved


def test_max_steps_ends_training(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, max_steps=2)
    assert train(trainer, tokenizer)["num_steps"] == 2
    assert set(trainer.context.tracker.rows) == {1, 2}


def test_adapters_lower_the_loss_and_leave_the_base_model_unchanged(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_of(tiny_model, frozen=1, lora=LoraConfig(rank=8), num_epochs=8)
    before = weights(trainer)
    numbers = train(trainer, tokenizer)
    assert numbers["heldout_loss"] < 0.8 * numbers["heldout_loss_before"]
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


def test_adapters_start_at_the_loss_of_the_plain_model(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    losses = [trainer_of(tiny_model, lora=lora).heldout_loss(encoded(tokenizer)) for lora in (None, LoraConfig())]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_adapters_resume_from_a_checkpoint(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    undisturbed = trainer_of(tiny_model, lora=LoraConfig())
    expected = train(undisturbed, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train(
            trainer_of(
                tiny_model, lora=LoraConfig(), checkpoints=checkpoints_every_step(tmp_path, "sft"), interrupt_at=4
            ),
            tokenizer,
        )
    resumed = trainer_of(tiny_model, lora=LoraConfig(), checkpoints=checkpoints_every_step(tmp_path, "sft"))
    assert train(resumed, tokenizer) == expected
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(resumed).items())


@pytest.mark.parametrize("interrupt_at", [2, 4, 6])
def test_resumed_run_equals_an_uninterrupted_one(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, interrupt_at: int
) -> None:
    undisturbed = trainer_of(tiny_model)
    expected = train(undisturbed, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        train(
            trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "sft"), interrupt_at=interrupt_at),
            tokenizer,
        )
    resumed = trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "sft"))
    assert train(resumed, tokenizer) == expected
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(resumed).items())
    assert set(resumed.context.tracker.rows) == set(range(interrupt_at, 7))
    for step in range(interrupt_at, 7):
        assert resumed.context.tracker.rows[step] == undisturbed.context.tracker.rows[step]


def test_resume_after_the_last_step_trains_nothing(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    done = trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "sft"))
    expected = train(done, tokenizer)
    again = trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "sft"))
    assert train(again, tokenizer) == expected
    assert all(torch.equal(weight, weights(done)[name]) for name, weight in weights(again).items())


def test_checkpoint_with_other_frozen_layers_is_refused(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train(trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "sft")), tokenizer)
    with pytest.raises(InputError, match="holds a different set of trained weights"):
        train(trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "sft"), frozen=1), tokenizer)


def test_non_finite_loss_names_step_and_records(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = trainer_of(tiny_model, training={"learning_rate": 1e30, "warmup_fraction": 0.0})
    with pytest.raises(InputError, match=r"(loss|grad_norm) is (nan|inf) at step 2 \(demonstrations \[\d") as error:
        train(trainer, tokenizer)
    assert "no checkpoint had been saved yet" in str(error.value)
    assert "Lower the learning rate" in str(error.value)


def test_non_finite_loss_after_the_last_step_is_an_error(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """No training loss sees the weights after the last step, but the stage must still fail."""
    trainer = trainer_of(tiny_model, max_steps=1)
    log = trainer.context.tracker.log

    def log_and_break(metrics: Any, step: int) -> None:
        log(metrics, step)
        with torch.no_grad():
            trainer.actor.lm.model.norm.weight.fill_(math.nan)

    trainer.context.tracker.log = log_and_break  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"The held-out loss is nan at step 1 \(all held-out demonstrations\)"):
        train(trainer, tokenizer)


def test_non_finite_loss_names_the_latest_checkpoint(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model, checkpoints=checkpoints_every_step(tmp_path, "sft"))
    break_after_saving(trainer.context.checkpoints, step=3, weight=trainer.actor.lm.model.norm.weight)
    with pytest.raises(InputError, match="loss is nan at step 4") as error:
        train(trainer, tokenizer)
    assert f"the latest checkpoint is {tmp_path}/sft/x/step-00000003" in str(error.value)


def test_summary_shows_loss_before_and_after() -> None:
    text = as_markdown({"heldout_loss_before": 2.0, "heldout_loss": 1.0, "heldout_perplexity": math.e})
    assert "| held-out loss (nats per token) | 2.000 | 1.000 |" in text
    assert "| held-out perplexity | 7.4 | 2.7 |" in text


def test_stored_ids_give_the_same_weights(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = (Turn(context="It", answer=" is"), Turn(context=" good", answer=" so"))
    records = [*DATA, Demonstration(turns=turns)]
    for split, texts in (("train", records), ("heldout", HELDOUT)):
        save_records(tmp_path, split, texts)
        packed = [pack(encode_turns(tokenizer, text.turns, max_tokens=12)) for text in texts]
        save_tokens(tmp_path, split, packed, tokenizer, max_tokens=12)
    plain, stored = trainer_of(tiny_model), trainer_of(tiny_model)
    expected = plain.train(tokenizer, records, HELDOUT, max_tokens=12)
    monkeypatch.setattr("components.rlhf.data.token_files.pack", None)  # nothing is encoded
    assert stored.train(tokenizer, records, HELDOUT, max_tokens=12, folder=tmp_path) == expected
    assert all(torch.equal(weight, weights(plain)[name]) for name, weight in weights(stored).items())
    assert stored.context.tracker.rows == plain.context.tracker.rows


def test_stage_reads_the_stored_ids(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "data"
    write_manifest(base, kind="base_model")
    data.mkdir()
    save_dataset(data, {"train": DATA, "heldout": HELDOUT}, max_tokens=64, counts={})
    for split, texts in (("train", DATA), ("heldout", HELDOUT)):
        packed = [pack(encode_turns(tokenizer, text.turns, max_tokens=64)) for text in texts]
        save_tokens(data, split, packed, tokenizer, max_tokens=64)
    write_manifest(data, kind="demonstrations")
    monkeypatch.setattr("components.rlhf.data.token_files.pack", None)  # nothing is encoded
    paths = {"base-model": base, "demonstrations": data} | {
        name: tmp_path / name for name in ("model", "metrics", "summary")
    }
    options = [item for name, path in paths.items() for item in (f"--{name}", str(path))]
    settings = trainer_of(tiny_model, num_epochs=1).config.canonical_json()
    done = CliRunner().invoke(main, [*options, "--settings", settings])
    assert done.exit_code == 0, (done.stderr, done.exception)
