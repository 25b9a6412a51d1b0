"""Reward models that were trained elsewhere, from import_model to PPO."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from components.import_model.importer import import_model
from components.reward_model.calibration import sample_responses
from components.reward_model.imported import measure_imported, scored_as
from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.model import LoraConfig
from components.rlhf.data.records import Completion, Conversation, Message, PreferencePair, Prompt
from components.rlhf.models.loading import is_scored_as_text, reward_normalization
from components.rlhf.models.saving import save_model
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.text.errors import InputError
from tests.support.chat_tokenizers import make_tokenizer
from tests.support.ppo_runs import PROMPTS, VALIDATION, trainer_of
from tests.support.ppo_runs import config_of as ppo_config_of
from tests.support.public_reward_models import make_public_reward_model
from tests.support.reward_model_runs import HELDOUT, config_of
from tests.support.tiny_model import make_tiny_tokenizer

CPU, FP32 = torch.device("cpu"), torch.float32
CHAT_PAIRS = [
    PreferencePair(
        prompt=f"<user>{n}\n<assistant>",
        chosen="good",
        rejected="bad",
        conversation=Conversation(messages=(Message(role="user", content=str(n)),)),
    )
    for n in range(4)
]


def imported(source: Path, target: Path) -> Path:
    target.mkdir()
    config = ImportModelStageConfig(kind="reward_model", source=str(source))
    import_model(config, target, lambda _: None)
    return target


def measure(folder: Path, sft: Path, target: Path, pairs: Any = HELDOUT) -> tuple[Path, dict[str, float], list[str]]:
    """The stage's result for an imported reward model, its numbers and its log."""
    log: list[str] = []
    config = config_of()
    texts = {"pairs": pairs, "responses": sample_responses(config, sft, PROMPTS * 4), "max_tokens": 64}
    result = measure_imported(folder, config, sft, texts, log.append)
    target.mkdir()
    save_model(result.model.lm, result.tokenizer, target, dtype=FP32)
    return target, result.numbers, log


def test_public_model_with_another_tokenizer_is_calibrated_and_read_as_text(tiny_model: Path, tmp_path: Path) -> None:
    folder = imported(make_public_reward_model(tmp_path / "public"), tmp_path / "imported")
    saved, numbers, log = measure(folder, tiny_model, tmp_path / "saved", CHAT_PAIRS)
    assert log == ["the reward model reads text, with its own tokenizer"]
    assert is_scored_as_text(saved)
    assert reward_normalization(saved) == (numbers["reward_mean"], numbers["reward_std"])
    assert numbers["reward_std"] > 5  # raw scores in the tens would all be clipped at 10
    assert AutoTokenizer.from_pretrained(saved).get_vocab() == make_tokenizer("gemma").get_vocab()


@pytest.mark.parametrize("change", ["pad", "template", "nothing"])
def test_public_model_with_the_same_ids_reads_them(tiny_model: Path, tmp_path: Path, change: str) -> None:
    tokenizer = make_tiny_tokenizer()
    if change == "pad":
        tokenizer.pad_token = None
    if change == "template":
        tokenizer.chat_template = "{{ messages }}"
    folder = imported(make_public_reward_model(tmp_path / "public", tokenizer), tmp_path / "imported")
    saved, _, log = measure(folder, tiny_model, tmp_path / "saved")
    assert log == ["the reward model reads the SFT model's token ids"]
    assert not is_scored_as_text(saved)


def test_first_scores_of_ppo_have_mean_0_and_std_1_and_are_not_clipped(tiny_model: Path, tmp_path: Path) -> None:
    folder = imported(make_public_reward_model(tmp_path / "public"), tmp_path / "imported")
    saved, _, _ = measure(folder, tiny_model, tmp_path / "saved")
    row = trainer_of(ppo_config_of(), tiny_model, saved).train(PROMPTS, [])[0]
    assert abs(row["score/mean"]) < 1.5
    assert 0.2 < row["score/std"] < 3
    assert row["score/clipped_fraction"] == 0.0
    raw = trainer_of(ppo_config_of(normalize_reward=False), tiny_model, saved).train(PROMPTS, [])[0]
    assert raw["score/clipped_fraction"] > 0.5


SETTINGS = {
    "plain": {},
    "frozen": {"frozen": 1},
    "critic's head": {"critic": {"trains": "head"}},
    "frozen, critic's head": {"frozen": 1, "critic": {"trains": "head"}},
    "lora": {"lora": LoraConfig(rank=4)},
    "lora, critic's head": {"lora": LoraConfig(rank=4), "critic": {"trains": "head"}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_ppo_learns_from_the_scores_of_text(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = imported(make_public_reward_model(tmp_path / "public"), tmp_path / "imported")
    saved, _, _ = measure(folder, tiny_model, tmp_path / "saved")
    trainer = trainer_of(ppo_config_of(eval_every=1, **settings), tiny_model, saved)
    scorer = load_reward_scorer(saved, dtype=FP32, device=CPU, microbatch_tokens=64)
    seen: list[Completion] = []
    generate = trainer.rollout.generate

    def remember(*arguments: Any) -> list[Completion]:
        seen[:] = generate(*arguments)
        return list(seen)

    trainer.rollout.generate = remember
    history = trainer.train(PROMPTS, VALIDATION)
    # The last rollout is the validation after iteration 2.
    assert history[1]["validation/score/mean"] == pytest.approx(float(scorer.score(seen).mean()), abs=1e-4)
    assert history[0]["kl/sequence"] == 0.0
    assert history[1]["kl/sequence"] != 0.0
    assert trainer.learner.models.critic.lm.config.vocab_size == trainer.learner.models.actor.lm.config.vocab_size


def test_bias_of_a_head_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    folder = imported(make_public_reward_model(tmp_path / "public", tokenizer, offset=50.0), tmp_path / "imported")
    saved, numbers, _ = measure(folder, tiny_model, tmp_path / "saved")
    without = imported(make_public_reward_model(tmp_path / "without", tokenizer), tmp_path / "imported without")
    _, numbers_without, _ = measure(without, tiny_model, tmp_path / "saved without")
    assert numbers["reward_mean"] == pytest.approx(numbers_without["reward_mean"] + 50, abs=1e-3)
    assert numbers["reward_std"] == pytest.approx(numbers_without["reward_std"], abs=1e-3)
    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()  # without the bias
    found = Completion(
        prompt=Prompt(prompt="x"), prompt_ids=[5, 6], response_ids=[7, 8], response="y", logprobs=None, truncated=True
    )
    with torch.no_grad():
        raw = float(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, 0]) + 50
    expected = (raw - numbers["reward_mean"]) / numbers["reward_std"]
    scorer = load_reward_scorer(saved, dtype=FP32, device=CPU, microbatch_tokens=64)
    assert float(scorer.score([found])[0]) == pytest.approx(expected, abs=1e-4)


def test_chats_need_a_template_of_the_reward_model() -> None:
    own, actors = make_tokenizer("no template"), make_tiny_tokenizer()
    assert scored_as(own, actors, has_chats=False) == "text"
    with pytest.raises(InputError, match="no chat template, so it cannot read conversations; add its chat template"):
        scored_as(own, actors, has_chats=True)


def test_imported_reward_model_has_its_own_manifest(tmp_path: Path) -> None:
    folder = imported(make_public_reward_model(tmp_path / "public"), tmp_path / "imported")
    assert write_manifest(folder, kind="reward_model").kind == "reward_model"
