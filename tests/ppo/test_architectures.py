"""SFT, reward model and PPO of architectures that differ from Llama in logits, masks, positions, experts or state."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.reward_model.trainer import EncodedPair
from components.rlhf.data.tokenizer import EncodedText
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.packing import plan_for
from components.rlhf.models.saving import save_model
from components.rlhf.models.scalar import ScalarModel
from components.sft.trainer import SftTrainer
from tests.ppo.test_trainer import config_of
from tests.sft.test_trainer import DATA, HELDOUT, encoded
from tests.sft.test_trainer import trainer_of as sft_trainer_of
from tests.support.architectures import MIXTURES_OF_EXPERTS, make_folder
from tests.support.ppo_runs import PROMPTS, VALIDATION, make_reward_model
from tests.support.ppo_runs import trainer_of as ppo_trainer_of
from tests.support.reward_model_runs import PAIRS
from tests.support.reward_model_runs import trainer_of as reward_trainer_of

KINDS = (
    "granite",  # scaled logits
    "cohere",  # scaled logits, parallel attention and MLP
    "gemma2",  # soft-capped logits, scaled embeddings, every other layer with a sliding window
    "gemma3_text",  # a RoPE for each kind of layer
    "qwen2",  # sliding windows from a layer on
    "gpt2",  # layers in `h`, learned positions, no reward-model class with another base name
    "opt",  # the decoder inside of the model
    "falcon",
    "llama4_text",  # chunked attention
    "minicpm3",  # scaled states before the head
    "falcon_h1",  # attention and a state-space model in every layer
    "lfm2",  # convolutions
    "qwen3_next",  # linear attention, experts
    *MIXTURES_OF_EXPERTS,
)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(request.param, tmp_path_factory.mktemp(request.param) / "model")


def sft_of(folder: Path, frozen: int) -> SftTrainer:
    return sft_trainer_of(
        folder, frozen=frozen, batch_size=len(DATA), num_epochs=2, training={"microbatch_tokens": 9999}
    )


@pytest.mark.parametrize("frozen", [0, 2])
def test_first_sft_loss_is_that_of_transformers(folder: Path, frozen: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = encoded(tokenizer)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text.prompt_ids + text.response_ids])
            logprobs = torch.log_softmax(lm(input_ids=ids, use_cache=False).logits[0].double(), -1)
            start = len(text.prompt_ids)
            total -= float(logprobs[start - 1 : -1].gather(1, ids[0, start:, None]).sum())
    expected = total / sum(len(text.response_ids) for text in texts)
    trainer = sft_of(folder, frozen)
    trainer.train(tokenizer, DATA, HELDOUT, max_tokens=64)
    first = trainer.context.tracker.rows[1]
    assert first["train/loss"] - first.get("train/router_loss", 0.0) == pytest.approx(expected, abs=1e-3)


def test_ppo_begins_at_kl_0_and_stays_in_step_with_the_rollout_engine(folder: Path, tmp_path: Path) -> None:
    reward_model = make_reward_model(folder, tmp_path / "reward_model")
    trainer = ppo_trainer_of(config_of(frozen=2, eval_every=1), folder, reward_model)
    history = trainer.train(PROMPTS, VALIDATION)
    assert history[0]["kl/sequence"] == 0.0
    assert history[0]["actor/first_ratio_error"] == 0.0
    assert all(row["engine_gap/max"] < 1e-3 for row in history)
    assert history[1]["kl/sequence"] != 0.0


@pytest.mark.parametrize("kind", MIXTURES_OF_EXPERTS)
def test_router_loss_is_trained_and_logged_in_every_stage(kind: str, tmp_path: Path) -> None:
    folder = make_folder(kind, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sft = sft_of(folder, 0)
    sft.train(tokenizer, DATA, HELDOUT, max_tokens=64)
    texts = encoded(tokenizer)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lengths, theirs = [text.num_tokens for text in texts], 0.0
    for rows in plan_for(sft.actor)(lengths, 9999):  # the mean over forward passes, by their tokens
        width = max(lengths[row] for row in rows)
        ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for place, row in enumerate(rows):
            ids[place, : lengths[row]] = torch.tensor(texts[row].prompt_ids + texts[row].response_ids)
            mask[place, : lengths[row]] = 1
        loss = lm(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss.item()
        theirs += loss * lm.router_aux_loss_coef * sum(lengths[row] for row in rows) / sum(lengths)
    first = sft.context.tracker.rows[1]
    assert first["train/router_loss"] == pytest.approx(theirs, abs=1e-5)

    reward = reward_trainer_of(folder)
    reward.train(tokenizer, PAIRS, max_tokens=64)
    assert reward.context.tracker.rows[1]["train/router_loss"] > 0

    ppo = ppo_trainer_of(config_of(), folder, make_reward_model(folder, tmp_path / "reward_model"))
    row = ppo.train(PROMPTS, [])[0]
    assert row["actor/router_loss"] > 0
    assert row["critic/router_loss"] > 0


@pytest.mark.parametrize("limit", [999, 0])
def test_router_loss_of_the_reward_model_is_the_mean_over_passes_by_tokens(limit: int, tmp_path: Path) -> None:
    trainer = reward_trainer_of(make_folder("mixtral", tmp_path / "model"))
    trainer.model.pack_limit = limit
    texts = [
        EncodedText(prompt_ids=[5], response_ids=list(range(1, n)), response_mask=[True] * (n - 1), truncated=False)
        for n in (110, 4)
    ]
    scored = trainer.score_prefixes([EncodedPair(chosen=texts[0], rejected=texts[1], margin=0.0)])
    assert len(scored.passes) == (1 if limit else 2)
    expected = 0.0
    for rows in scored.passes:
        part = scored.batch.select(torch.tensor(rows))
        trainer.model.prefix_scores(part)
        expected += float(trainer.model.router_loss) * int(part.lengths.sum()) / 114
    assert float(scored.router_loss) == pytest.approx(expected, rel=1e-5)


def test_router_loss_changes_the_gradient_of_the_router(tmp_path: Path) -> None:
    folder = make_folder("mixtral", tmp_path / "model")
    trainer = sft_of(folder, 0)
    texts = encoded(AutoTokenizer.from_pretrained(folder))
    router = next(weight for name, weight in trainer.actor.named_parameters() if name.endswith("gate.weight"))
    trainer._loss(texts, 10).backward()
    without = router.grad.clone()
    router.grad = None
    (trainer._loss(texts, 10) + trainer.actor.router_loss).backward()
    assert not torch.allclose(router.grad, without, atol=1e-7)


def test_dense_model_has_no_router_loss(tiny_model: Path) -> None:
    trainer = sft_of(tiny_model, 0)
    trainer.train(AutoTokenizer.from_pretrained(tiny_model), DATA, HELDOUT, max_tokens=64)
    assert not any("router" in name for name in trainer.context.tracker.rows[1])


def test_reward_model_of_an_architecture_without_a_class_is_saved_and_loaded(tmp_path: Path) -> None:
    folder = make_folder("granite", tmp_path / "model")
    reward = reward_trainer_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reward.train(tokenizer, PAIRS, max_tokens=64)
    save_model(reward.model.lm, tokenizer, tmp_path / "saved", dtype=torch.float32)
    again = load_scalar_lm(tmp_path / "saved", num_frozen_layers=0, dtype=torch.float32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(reward.model.lm.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("kind", ["llama4_text", "gpt2", "gemma2"])
def test_critic_that_trains_its_head_trains_exactly_the_head(kind: str, tmp_path: Path) -> None:
    lm = load_scalar_lm(make_folder(kind, tmp_path), num_frozen_layers=0, dtype=torch.float32, seed=1)
    model = ScalarModel(lm, num_frozen_layers=0, dtype=torch.float32, trains="head")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm.score.weight"]
