"""Responses of several turns: ids travel, budgets hold, and what fails is marked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from components.rlhf.config.environment import CalculatorEnvironment, FunctionEnvironment
from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.batching import collate_completions
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.environments.calculator import CalculatorHost
from components.rlhf.environments.metrics import turn_metrics
from components.rlhf.environments.play import Player
from components.rlhf.environments.protocol import Step
from components.rlhf.models.actor import Actor
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.controls import sampling_distribution
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.errors import InputError

PROMPTS = [Prompt(prompt=text) for text in ["a film", "b", "the longest prompt", "no", "It was"]]
SEEDS = list(range(5))
EOS = 0


class Scripted:
    """A host that answers by a function of (number, turn, text)."""

    def __init__(self, answer: Callable[[int, int, str], Step], failed: Mapping[int, str] | None = None) -> None:
        self.answer, self.failed = answer, dict(failed or {})
        self.texts: dict[int, list[str]] = {}
        self.ended: list[int] = []

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, str]:
        self.texts = {number: [] for number in prompts}
        return self.failed

    def step(self, texts: Mapping[int, str]) -> dict[int, Step]:
        found = {}
        for number, text in texts.items():
            self.texts[number].append(text)
            found[number] = self.answer(number, len(self.texts[number]), text)
        return found

    def end(self, numbers: Sequence[int]) -> None:
        self.ended += numbers

    def close(self) -> None: ...


class ScriptedEngine:
    """Writes given texts in the tokens of a byte-level tokenizer, each with an end token unless it ends with ">"."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.asked: list[tuple[list[int], int]] = []

    def generate(self, prompts: Any, sampling: Any, seeds: Any, *, greedy: bool, after: Any, limits: Any) -> Any:
        found = []
        for prompt, ids, limit in zip(prompts, after, limits, strict=True):
            self.asked.append((list(ids), limit))
            context, text = self.tokenizer(prompt.prompt)["input_ids"] + list(ids), self.texts.pop(0)
            response = self.tokenizer(text)["input_ids"] + ([] if text.endswith(">") else [EOS])
            is_cut, response = len(response) > limit, response[:limit]
            stop = next((s for s in sampling.stop if text.endswith(s)), "")
            found.append(
                Completion(
                    prompt=prompt,
                    prompt_ids=context,
                    response_ids=response,
                    response=text.removesuffix(stop),
                    logprobs=torch.full((len(response),), -1.0),
                    truncated=is_cut,
                )
            )
        return found


def environment(**settings: Any) -> FunctionEnvironment:
    return FunctionEnvironment(**({"kind": "function", "function": "mine:Game"} | settings))


def echo(number: int, turn: int, text: str) -> Step:
    return Step(observation=f"[{turn}]", reward=0.5, done=turn == 3)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> HfRolloutEngine:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    # A tenth of the vocabulary ends a turn.
    return HfRolloutEngine(lm, AutoTokenizer.from_pretrained(tiny_model), stop_ids=tuple(range(0, 257, 10)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def how(**settings: Any) -> SamplingConfig:
    return SamplingConfig(**({"max_new_tokens": 20, "batch_size": 4} | settings))


def test_turns_continue_the_ids_of_the_response(engine: HfRolloutEngine) -> None:
    found = Player(engine, environment(), Scripted(echo)).generate(PROMPTS, how(), SEEDS)
    assert len({len(c.turns) for c in found}) > 1
    for c, prompt, seed in zip(found, PROMPTS, SEEDS, strict=True):
        assert c.prompt_ids == engine.tokenizer(prompt.prompt)["input_ids"]
        assert c.response_mask is not None and c.logprobs is not None
        assert [turn.speaker for turn in c.turns] == (["model", "environment"] * 3)[: len(c.turns)]
        assert [0, *(turn.stop for turn in c.turns)] == [*(turn.start for turn in c.turns), len(c.response_ids)]
        assert c.turns[-1].speaker == "model"  # nobody would read an observation at the end
        budget = 20
        for number, turn in enumerate(c.turns):
            own = c.response_ids[turn.start : turn.stop]
            assert c.response_mask[turn.start : turn.stop] == [turn.speaker == "model"] * len(own)
            if turn.speaker == "environment":
                text = f"[{number // 2 + 1}]"
                assert own == engine.tokenizer(text)["input_ids"] and turn.text == text
                assert not c.logprobs[turn.start : turn.stop].any()
                continue
            if number == 0:  # as the engine alone would sample
                (alone,) = engine.generate([prompt], how(), [seed])
                assert own == alone.response_ids
            budget -= len(own)
        assert budget >= 0 and (c.truncated == (budget == 0 and own[-1] not in engine.stop_ids))
        assert c.environment_reward == 0.5 * (len(c.turns) // 2 + (not c.truncated))
    assert any(c.truncated for c in found) and not all(c.truncated for c in found)


def test_response_does_not_depend_on_the_rest_of_the_batch(engine: HfRolloutEngine) -> None:
    together = Player(engine, environment(), Scripted(echo)).generate(PROMPTS, how(), SEEDS)
    for row in range(5):
        (alone,) = Player(engine, environment(), Scripted(echo)).generate([PROMPTS[row]], how(), [SEEDS[row]])
        assert alone.response_ids == together[row].response_ids and alone.turns == together[row].turns
    (other,) = Player(engine, environment(), Scripted(echo)).generate(PROMPTS[:1], how(), [77])
    assert other.response_ids != together[0].response_ids


@pytest.mark.parametrize("controls", [{}, {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.3}], ids=str)
def test_log_probs_are_those_of_the_trainer_after_all_that_was_said_before(
    engine: HfRolloutEngine, controls: dict[str, Any]
) -> None:
    sampling = how(**controls)
    found = Player(engine, environment(), Scripted(echo)).generate(PROMPTS, sampling, SEEDS)
    batch = collate_completions(found)
    actor = Actor(engine.model, num_frozen_layers=0, dtype=torch.float32)
    with torch.no_grad():
        logprobs, _ = actor(batch, sampling_distribution(sampling, engine.stop_ids))
    for row, c in enumerate(found):
        assert c.logprobs is not None
        assert torch.allclose(logprobs[row, : len(c.logprobs)], c.logprobs, atol=1e-4)
    assert any(len(c.turns) > 1 for c in found)


def test_one_turn_is_what_the_engine_samples_alone(engine: HfRolloutEngine) -> None:
    host = Scripted(lambda *_: Step(done=True, reward=2.0))
    found = Player(engine, environment(), host).generate(PROMPTS, how(), SEEDS)
    for c, alone in zip(found, engine.generate(PROMPTS, how(), SEEDS), strict=True):
        assert c.response_ids == alone.response_ids and c.response == alone.response
        assert c.answer == alone.response and c.truncated == alone.truncated
        assert torch.equal(c.logprobs, alone.logprobs)  # type: ignore[arg-type]
        assert c.environment_reward == (0.0 if alone.truncated else 2.0)
    assert host.ended == [0, 1, 2, 3, 4]


def test_calculator_played_to_its_end(tokenizer: Any) -> None:
    scripted = ScriptedEngine(tokenizer, "<calc>6*7</calc>", "42")
    config = CalculatorEnvironment(kind="calculator", max_observation_tokens=8)
    (c,) = Player(scripted, config, CalculatorHost()).generate(PROMPTS[:1], how(max_new_tokens=30), [0])  # type: ignore[arg-type]
    assert c.response == "<calc>6*7</calc> = 42\n42" and c.answer == "42" and not c.truncated
    assert [(turn.speaker, turn.text) for turn in c.turns] == [
        ("model", "<calc>6*7</calc>"),
        ("environment", " = 42\n"),
        ("model", "42"),
    ]
    assert c.response_ids == [*tokenizer("<calc>6*7</calc> = 42\n42")["input_ids"], EOS]
    assert c.response_mask == [True] * 16 + [False] * 6 + [True] * 3
    assert scripted.asked == [([], 30), (c.response_ids[:22], 14)]


@pytest.mark.parametrize(
    ("texts", "budget", "turns", "turn_limit", "truncated"),
    [
        (["ab>", "cd>", "ef"], 30, 5, 3, False),
        (["ab>", "cd>", "ef>"], 30, 5, 3, True),  # no turn is left for an answer
        (["ab>", "cd>"], 6, 3, 3, True),  # no token is left for one: the observation is not added
        (["ab>", "cdefgh"], 6, 3, 3, True),  # cut in the middle
        (["ab>"], 30, 1, 1, True),
        (["ab"], 30, 1, 1, False),
    ],
)
def test_limits_of_turns_and_tokens(
    tokenizer: Any, texts: list[str], budget: int, turns: int, turn_limit: int, truncated: bool
) -> None:
    host = Scripted(lambda _number, _turn, text: Step(observation="!", reward=1.0, done=not text.endswith(">")))
    scripted = ScriptedEngine(tokenizer, *texts)
    player = Player(scripted, environment(max_turns=turn_limit, stop=[">"]), host)  # type: ignore[arg-type]
    (c,) = player.generate(PROMPTS[:1], how(max_new_tokens=budget), [0])
    assert (len(c.turns), c.truncated) == (turns, truncated)
    assert c.num_model_tokens <= budget
    assert c.environment_reward == len(host.texts[0])
    # The environment reads whole turns, with the stop string, which the last turn of the response is without.
    assert host.texts[0] == texts[: len(host.texts[0])]
    assert c.answer == c.turns[-1].text and not c.answer.endswith(">")


def test_observation_is_cut(tokenizer: Any) -> None:
    host = Scripted(lambda _number, turn, _text: Step(observation="x" * 99 if turn == 1 else "", done=turn == 3))
    scripted = ScriptedEngine(tokenizer, "a", "b", "c")
    (c,) = Player(scripted, environment(max_observation_tokens=4), host).generate(PROMPTS[:1], how(), [0])  # type: ignore[arg-type]
    assert [turn.text for turn in c.turns] == ["a", "xxxx", "b", "c"]  # an empty observation is no turn
    assert c.response_mask == [True, True, *[False] * 4, *[True] * 4]


def test_failures_are_marked_and_stop_their_response(tokenizer: Any) -> None:
    answers = {1: Step(failure="timed out after 9 seconds"), 2: Step(failure="raised ValueError: oh")}
    host = Scripted(
        lambda number, turn, _: answers.get(number) or Step(observation="o", reward=1.0, done=turn == 2),
        {0: "raised E: x"},
    )
    texts = [*[f"t{i}" for i in range(12)], *[f"u{i}" for i in range(9)]]
    prompts = [Prompt(prompt=str(i)) for i in range(12)]
    logged: list[str] = []
    player = Player(ScriptedEngine(tokenizer, *texts), environment(), host, logged.append)  # type: ignore[arg-type]
    found = player.generate(prompts, how(), list(range(12)))
    assert [c.failure for c in found] == [
        "raised E: x",
        "timed out after 9 seconds",
        "raised ValueError: oh",
        *[""] * 9,
    ]
    assert [len(c.turns) for c in found] == [1, 1, 1, *[3] * 9]
    assert host.texts[0] == []  # it never began
    assert logged == [
        "environment: no learning from 3 of 12 responses (the first is to prompt '0': it raised E: x)",
    ]
    metrics = turn_metrics(found, lambda x: 2 * x)  # two processes
    assert metrics == {
        "environment/turns": 2.0,
        "environment/tokens": 1.0,
        "environment/reward": 2.0,
        "environment/failed": pytest.approx(3 / 12),
        "environment/timed_out": pytest.approx(1 / 12),
    }


def test_environment_that_fails_too_often_ends_the_run(tokenizer: Any) -> None:
    host = Scripted(lambda *_: Step(failure="timed out after 9 seconds"))
    prompts = [Prompt(prompt=str(i)) for i in range(4)]
    player = Player(ScriptedEngine(tokenizer, *"abcd"), environment(), host, lambda line: None)  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"environment fails for 4 of 4 responses \(the first is to prompt '0': it timed out"
    ):
        player.generate(prompts, how(), [0] * 4)


def test_metrics_of_no_response_are_finite() -> None:
    assert set(turn_metrics([], lambda x: x).values()) == {0.0}


def test_completion_knows_its_model_tokens() -> None:
    one = Completion(
        prompt=PROMPTS[0], prompt_ids=[1], response_ids=[1, 2, 3, 4], response="", logprobs=None, truncated=False
    )
    assert (one.num_model_tokens, one.model_runs) == (4, [[1, 2, 3, 4]])
    holes = replace(one, response_mask=[True, False, True, True])
    assert (holes.num_model_tokens, holes.model_runs) == (3, [[1], [3, 4]])
