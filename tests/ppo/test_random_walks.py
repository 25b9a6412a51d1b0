"""RLHF on a task with a known optimum: SFT imitates the behaviour policy, PPO then reaches the optimum."""

from pathlib import Path
from statistics import mean
from typing import get_args

import pytest

from components.rlhf.config.ppo import AdvantageEstimator
from tests.support.ppo_runs import config_of, load, trainer_of
from tests.support.random_walks import EOS, GOAL, NUM_NODES, Walks, make_walks
from tests.support.walking import STARTS, make_imitator, mean_optimality, settings_of


@pytest.fixture(scope="module")
def walks() -> Walks:
    return make_walks()


@pytest.fixture(scope="module")
def imitator(walks: Walks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_imitator(tmp_path_factory.mktemp("walks"), walks)


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
    ("advantage", "frozen"),
    [pytest.param("gae", 0, marks=pytest.mark.slow), *((advantage, 1) for advantage in get_args(AdvantageEstimator))],
)
def test_every_estimator_finds_the_shortest_walks(
    imitator: Path, walks: Walks, advantage: AdvantageEstimator, frozen: int
) -> None:
    stage = settings_of(advantage, frozen=frozen)
    trainer = trainer_of(stage, imitator / "sft", imitator / "critic", reward=walks.reward)
    before = mean_optimality(trainer.rollout, walks)
    history = trainer.train(STARTS, [])
    after = mean_optimality(trainer.rollout, walks)
    assert before < 0.84
    assert after >= 0.97
    assert history[-1]["response/length"] < history[0]["response/length"]  # shorter walks
    assert history[-1]["kl/sequence"] > 0.2  # at the cost of distance from the behaviour policy
