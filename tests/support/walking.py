"""PPO on random walks: a model that imitates the behaviour policy, settings that find the shortest walks, and their measure."""

from pathlib import Path
from statistics import mean

from components.rlhf.config.model import ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.ppo import GROUP_ESTIMATORS, AdvantageEstimator, PpoStageConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import Demonstration, Prompt, Turn
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.saving import save_model
from components.rlhf.rollout.protocol import RolloutEngine
from components.sft.trainer import SftTrainer
from tests.support.ppo_runs import FP32, config_of, make_reward_model
from tests.support.random_walks import MAX_NODES, NUM_NODES, Walks, as_text, make_model
from tests.support.training import context_of

STARTS = [Prompt(prompt=as_text([node]), id=str(node)) for node in range(1, NUM_NODES)]


def make_imitator(folder: Path, walks: Walks) -> Path:
    """A model that was fine-tuned on the behaviour policy, and a reward model with a new head that the critic starts from."""
    base = make_model(folder / "base", hidden_size=32)
    stage = SftStageConfig(
        model=ModelConfig(precision="fp32"),
        sft=SftConfig(
            num_epochs=100,
            max_steps=300,
            batch_size=128,
            training=TrainingConfig(learning_rate=5e-3, warmup_fraction=0.05),
        ),
        checkpoint=CheckpointConfig(),
        seed=0,
    )
    trainer = SftTrainer(stage, base, context_of("sft"))
    texts = [
        Demonstration(turns=(Turn(context=as_text(walk[:1]), answer=as_text(walk[1:])),)) for walk in walks.behaviour
    ]
    tokenizer = load_tokenizer(base)
    trainer.train(tokenizer, texts, [], max_tokens=MAX_NODES + 1)
    save_model(trainer.actor.lm, tokenizer, folder / "sft", dtype=FP32)
    make_reward_model(folder / "sft", folder / "critic", mean=0.0, std=1.0, head_scale=1.0)
    return folder


def settings_of(advantage: AdvantageEstimator, *, frozen: int) -> PpoStageConfig:
    """The same settings for every estimator: 30 iterations of 128 walks, 4 epochs, no KL penalty."""
    size = 4 if advantage in GROUP_ESTIMATORS else 1
    return config_of(
        frozen=frozen,
        seed=0,
        advantage=advantage,
        num_iterations=30,
        num_epochs=4,
        minibatch=128,
        kl_coef=0.0,
        rollout={"num_prompts": 128 // size, "samples_per_prompt": size},
        sampling={"max_new_tokens": MAX_NODES, "batch_size": 128},
        training={"learning_rate": 1e-3, "schedule": "linear"},
        critic={"learning_rate": 3e-3} if advantage == "gae" else {},
    )


def mean_optimality(rollout: RolloutEngine, walks: Walks) -> float:
    """Mean optimality over a hundred samples from each start, with seeds that training does not use."""
    number = 100
    completions = rollout.generate(
        STARTS * number, SamplingConfig(max_new_tokens=MAX_NODES, batch_size=500), range(10**9, 10**9 + 20 * number)
    )
    return mean(walks.reward(c.prompt_ids, c.response_ids) for c in completions)
