"""RLHF on a task with a known optimum: SFT imitates the behaviour policy, PPO then reaches the optimum."""

from pathlib import Path
from statistics import mean
from typing import get_args

import pytest

from components.rlhf.config.model import ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.ppo import GROUP_ESTIMATORS, AdvantageEstimator
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import Demonstration, Prompt, Turn
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.saving import save_model
from components.rlhf.rollout.protocol import RolloutEngine
from components.sft.trainer import SftTrainer
from tests.support.ppo_runs import FP32, config_of, load, make_reward_model, trainer_of
from tests.support.random_walks import EOS, GOAL, MAX_NODES, NUM_NODES, Walks, as_text, make_model, make_walks
from tests.support.training import context_of

STARTS = [Prompt(prompt=as_text([node]), id=str(node)) for node in range(1, NUM_NODES)]


@pytest.fixture(scope="module")
def walks() -> Walks:
    return make_walks()


@pytest.fixture(scope="module")
def imitator(walks: Walks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was fine-tuned on the behaviour policy, and a reward model with a new head that the critic starts from."""
    folder = tmp_path_factory.mktemp("walks")
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
    context = context_of("sft")
    trainer = SftTrainer(stage, base, context)
    texts = [
        Demonstration(turns=(Turn(context=as_text(walk[:1]), answer=as_text(walk[1:])),)) for walk in walks.behaviour
    ]
    tokenizer = load_tokenizer(base)
    trainer.train(tokenizer, texts, [], max_tokens=MAX_NODES + 1)
    save_model(trainer.actor.lm, tokenizer, folder / "sft", dtype=FP32)
    make_reward_model(folder / "sft", folder / "critic", mean=0.0, std=1.0, head_scale=1.0)
    return folder


def mean_optimality(rollout: RolloutEngine, walks: Walks) -> float:
    """Mean optimality over a hundred samples from each start, with seeds that training does not use."""
    number = 100
    completions = rollout.generate(
        STARTS * number, SamplingConfig(max_new_tokens=MAX_NODES, batch_size=500), range(10**9, 10**9 + 20 * number)
    )
    return mean(walks.reward(c.prompt_ids, c.response_ids) for c in completions)


# Published properties of the task: 43 edges with the goal's own, best walks of 3.55 nodes, 0.79.


def test_graph_of_the_task(walks: Walks) -> None:
    assert sum(len(there) for there in walks.edges) + 1 == 43
    assert mean(walks.shortest[start] for start in range(1, NUM_NODES)) == pytest.approx(3.55)


def test_behaviour_policy_walks_along_edges(walks: Walks) -> None:
    assert mean(walks.optimality(walk) for walk in walks.behaviour) == pytest.approx(0.79, abs=0.03)
    assert mean(walk[-1] == GOAL for walk in walks.behaviour) == pytest.approx(0.985, abs=0.01)


def test_optimality_of_hand_computed_walks() -> None:
    line = Walks(edges=[[], [0], [1, 3], [1, 2]], shortest={0: 1, 1: 2, 2: 3, 3: 3}, behaviour=[])
    assert line.optimality([1, 0]) == 1.0
    assert line.optimality([2, 1, 0]) == 1.0
    assert line.optimality([2, 3, 1, 0]) == pytest.approx(6 / 7)
    assert line.optimality([2, 3, 2, 3, 2, 3, 2, 3, 1, 0]) == 0.0  # all ten nodes
    assert line.optimality([2, 0]) == 0.0  # no such edge
    assert line.optimality([2, 3]) == 0.0  # never arrives
    assert line.reward([2], [1, 0, EOS]) == 1.0
    assert line.reward([2], [1, EOS, 0]) == 0.0


def test_sft_imitates_the_behaviour_policy(imitator: Path, walks: Walks) -> None:
    _, rollout = load(config_of(), imitator / "sft", imitator / "critic")
    behaviour = mean(walks.optimality(walk) for walk in walks.behaviour)
    assert mean_optimality(rollout, walks) == pytest.approx(behaviour, abs=0.05)


@pytest.mark.parametrize(
    ("advantage", "frozen"), [("gae", 0), *((advantage, 1) for advantage in get_args(AdvantageEstimator))]
)
def test_every_estimator_finds_the_shortest_walks(
    imitator: Path, walks: Walks, advantage: AdvantageEstimator, frozen: int
) -> None:
    size = 4 if advantage in GROUP_ESTIMATORS else 1
    stage = config_of(
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
    trainer = trainer_of(stage, imitator / "sft", imitator / "critic", reward=walks.reward)
    before = mean_optimality(trainer.rollout, walks)
    history = trainer.train(STARTS, [])
    after = mean_optimality(trainer.rollout, walks)
    assert before < 0.84
    assert after >= 0.97
    assert history[-1]["response/length"] < history[0]["response/length"]  # shorter walks
    assert history[-1]["kl/sequence"] > 0.2  # at the cost of distance from the behaviour policy
