"""A small model learns by reinforcement to write calls that the calculator answers, and to repeat what it answers."""

from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoTokenizer

from components.ppo.trainer import PpoTrainer
from components.rlhf.config.model import ModelConfig, TrainingConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig, StorageConfig
from components.rlhf.data.records import Demonstration, Prompt, Turn
from components.rlhf.environments.factory import open_player
from components.rlhf.models.saving import save_model
from components.rlhf.rewards.rewards import open_rewards
from components.sft.trainer import SftTrainer
from tests.support.ppo_runs import FP32, config_of, load
from tests.support.tiny_model import make_tiny_model
from tests.support.training import context_of

pytestmark = pytest.mark.slow
PAIRS = [(a, b) for a in range(1, 10) for b in range(1, 10)]
PROMPTS = [Prompt(prompt=f"{a}+{b}?", id=f"{a}-{b}", columns={"answer": str(a + b)}) for a, b in PAIRS]


@pytest.fixture(scope="module")
def beginner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen how calls are written, and mostly writes them with other numbers."""
    folder = tmp_path_factory.mktemp("calculator")
    make_tiny_model(folder / "base", seed=0, hidden_size=64)
    stage = SftStageConfig(
        model=ModelConfig(precision="fp32"),
        sft=SftConfig(
            num_epochs=1000,
            max_steps=60,
            batch_size=27,
            training=TrainingConfig(learning_rate=3e-3, warmup_fraction=0.05),
        ),
        checkpoint=CheckpointConfig(),
        seed=0,
    )
    trainer = SftTrainer(stage, folder / "base", context_of("sft"))
    texts = [
        Demonstration(turns=(Turn(context=f"{a}+{b}?", answer=f"<calc>{a}+{b}</calc> = {a + b}\n{a + b}"),))
        for a, b in PAIRS
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    trainer.train(tokenizer, texts, [], max_tokens=60)
    save_model(trainer.actor.lm, tokenizer, folder / "sft", dtype=FP32)
    return folder / "sft"


def test_two_turns_with_the_calculator_rise_in_reward(beginner: Path) -> None:
    """From right answers in a fifth of the responses to about half, within a minute on one core."""
    stage = config_of(
        advantage="rloo",
        num_iterations=25,
        num_epochs=2,
        minibatch=64,
        kl_coef=0.0,
        missing_eos_penalty=0.5,
        eval_every=25,
        keep="last",
        environment={"kind": "calculator", "max_turns": 3, "max_observation_tokens": 8},
        rewards=[{"kind": "exact_match"}],
        rollout={"num_prompts": 32, "samples_per_prompt": 4},
        sampling={"max_new_tokens": 24, "batch_size": 128},
        training={"learning_rate": 6e-4},
    )
    models, rollout = load(stage, beginner, None)
    context = context_of("ppo")
    log = context.progress.log
    rewards = open_rewards(stage.ppo.rewards, None, max_new_tokens=24, storage=StorageConfig(), log=log)
    player = open_player(rollout, stage.ppo.environment, log=log)
    trainer = PpoTrainer(stage, models, rewards, rollout, context, player=player)
    history = trainer.train(PROMPTS, PROMPTS[::3])
    trainer.close()
    first, last = fmean(row["score/mean"] for row in history[:3]), fmean(row["score/mean"] for row in history[-5:])
    assert last > first + 0.2, (first, last)
    assert history[-1]["environment/failed"] == 0.0 and history[-1]["environment/turns"] > 1.8
    right = [sample for sample in trainer.validation if sample.iteration == 25 and sample.score == 1]
    assert len(right) > 5
    for sample in right:  # the model has the sum from the calculator, and asked for it in the numbers of the prompt
        call, observation, answer = sample.turns
        assert [turn.speaker for turn in sample.turns] == ["model", "environment", "model"]
        assert observation.text == f" = {answer.text}\n" and answer.text == sample.prompt.columns["answer"]
        assert call.text.startswith("<calc>") and call.text.endswith("</calc>")
