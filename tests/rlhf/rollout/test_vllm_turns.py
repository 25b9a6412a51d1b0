"""Responses of several turns with the real vLLM on a CPU, against transformers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from components.rlhf.config.environment import FunctionEnvironment
from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.rollout import VllmConfig
from components.rlhf.data.batching import collate_completions
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.environments.play import Player
from components.rlhf.environments.protocol import Step
from components.rlhf.models.actor import Actor
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.controls import sampling_distribution
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.rollout.vllm import VllmRolloutEngine
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.vllm

PROMPTS = [
    Prompt(prompt=text) for text in ["a film", "b", "the longest prompt of all", "It was a dark and stormy night; " * 5]
]
STOPS = tuple(range(0, 257, 10))
GAME = FunctionEnvironment(kind="function", function="mine:Game", stop=("e",))


class Echo:
    """Answers three turns, with the number of the turn."""

    def __init__(self) -> None:
        self.turns: dict[int, int] = {}

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, str]:
        self.turns = dict.fromkeys(prompts, 0)
        return {}

    def step(self, texts: Mapping[int, str]) -> dict[int, Step]:
        for number in texts:
            self.turns[number] += 1
        return {n: Step(observation=f" [{self.turns[n]}] ", reward=1.0, done=self.turns[n] == 3) for n in texts}

    def end(self, numbers: Sequence[int]) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    make_tiny_model(path, seed=0, hidden_size=128)  # vLLM's attention on a CPU wants heads of at least 32
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmRolloutEngine]:
    options: dict[str, Any] = {"stop_ids": STOPS, "dtype": torch.float32, "max_model_len": 256, "num_sequences": 8}
    made = VllmRolloutEngine(folder, VllmConfig(kv_cache_gib=0.05), **options)
    yield made
    made.close()


def played(engine: Any, **settings: Any) -> Any:
    sampling = SamplingConfig(**({"max_new_tokens": 24} | settings))
    return Player(engine, GAME, Echo()).generate(PROMPTS * 3, sampling, range(12)), sampling


def test_log_probs_are_those_of_the_trainer_after_all_that_was_said_before(
    engine: VllmRolloutEngine, folder: Path
) -> None:
    found, sampling = played(engine, temperature=0.9, repetition_penalty=1.2)
    assert {len(c.turns) for c in found} > {1} and any(c.truncated for c in found)
    actor = Actor(
        load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32), num_frozen_layers=0, dtype=torch.float32
    )
    with torch.no_grad():
        logprobs, _ = actor(collate_completions(found), sampling_distribution(sampling, STOPS))
    for row, c in enumerate(found):
        assert torch.allclose(logprobs[row, : len(c.logprobs)], c.logprobs, atol=2e-3)
        for turn in c.turns:
            if turn.speaker == "environment":
                assert c.response_ids[turn.start : turn.stop] == engine.tokenizer(turn.text)["input_ids"]
        assert c.num_model_tokens <= 24


def test_nearly_greedy_turns_equal_those_of_transformers(engine: VllmRolloutEngine, folder: Path) -> None:
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    hf = HfRolloutEngine(lm, load_tokenizer(folder), stop_ids=STOPS)
    (found, _), (expected, _) = played(engine, temperature=0.01), played(hf, temperature=0.01)
    for one, other in zip(found, expected, strict=True):
        assert one.response_ids == other.response_ids and one.turns == other.turns
        assert (one.response, one.truncated, one.environment_reward) == (
            other.response,
            other.truncated,
            other.environment_reward,
        )


def test_limits_of_single_rows(engine: VllmRolloutEngine) -> None:
    sampling = SamplingConfig(max_new_tokens=20)
    found = engine.generate(PROMPTS, sampling, range(4), after=[[9], [], [], []], limits=[1, 2, 20, 3])
    assert all(len(c.response_ids) <= limit for c, limit in zip(found, [1, 2, 20, 3], strict=True))
    assert found[0].prompt_ids[-1] == 9
