"""With an environment a response is planned as long as the model's tokens and all observations together."""

from typing import Any

import pytest

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.planner.durations import seconds_of_run
from components.rlhf.planner.other_stages import plan_evaluation
from components.rlhf.planner.plan import Shapes
from components.rlhf.planner.ppo_stage import plan_ppo
from tests.rlhf.planner.test_critic_free import CPU, LLAMA, job

DATA: dict[str, Any] = {
    "demonstrations": {"path": "d.jsonl"},
    "prompts": {"path": "p.jsonl", "keep": ["answer"]},
}
GAME = {"kind": "function", "function": "mine:Game", "source": "class Game: ...", "max_turns": 3}


def params_of(max_new_tokens: int, environment: dict[str, Any] | None) -> Params:
    rollout = {"sampling": {"max_new_tokens": max_new_tokens}, "samples_per_prompt": 2}
    ppo = {"advantage": "rloo", "rewards": {"kind": "exact_match"}, "rollout": rollout, "environment": environment}
    content = {"data": DATA, "judge": {"kind": "exact_match"}, "ppo": ppo, "cluster": {"allow_user_code": True}}
    return Params.model_validate(content)


def test_memory_and_time_are_those_of_the_longest_response() -> None:
    playing, long, short = (
        params_of(30, GAME | {"max_observation_tokens": 16}),
        params_of(62, None),
        params_of(30, None),
    )
    plans = {
        name: (
            plan_ppo(params.stage(PpoStageConfig), job(CPU, reward_shape=None)),
            plan_evaluation(params.stage(EvaluationStageConfig), job(CPU, reward_shape=None)),
        )
        for name, params in (("playing", playing), ("long", long), ("short", short))
    }
    for mine, other, less in zip(plans["playing"], plans["long"], plans["short"], strict=True):
        for phase, longer in zip(mine.phases, other.phases, strict=True):
            if (
                phase.name == "generate"
            ):  # the last turn begins with a pass over prompt and response: 1024 + 62 tokens for 1024
                ratio = phase.device["activations"] / longer.device["activations"]
                assert ratio == pytest.approx((1024 + 62) / 1024, rel=1e-3)
                both = {"activations": 0, "heap": 0}  # the heap loses a share of all temporary tensors
                assert {**phase.device, **both} == {**longer.device, **both}
            else:
                assert phase == longer
        assert mine.phases != less.phases

    shapes = Shapes(base=LLAMA, reward_model=None)
    seconds = {
        name: seconds_of_run(params, shapes, {"demonstrations": 100, "preferences": 0})
        for name, params in (("playing", playing), ("long", long), ("short", short))
    }
    for stage in ("ppo", "evaluation"):
        assert (
            seconds["playing"][stage].parts["score"]
            == seconds["long"][stage].parts["score"]
            > seconds["short"][stage].parts["score"]
        )
    assert seconds["playing"]["ppo"].note == "without the time of the environment, which is not known"
    assert seconds["long"]["ppo"].note == ""
