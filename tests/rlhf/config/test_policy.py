"""Which method trains the policy: what a run then has, reads and refuses."""

from typing import Any

import pytest

from components.rlhf.config.dpo import DpoStageConfig
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.policy import PolicyConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from tests.rlhf.config.test_settings import error_message, minimal_params

METHODS = ("ppo", "dpo", "both")
EXACT = {"kind": "exact_match"}
KEPT = {"path": "prompts.jsonl", "keep": ["answer"]}


def content_of(method: str, **sections: dict[str, Any]) -> dict[str, Any]:
    content = minimal_params() | {"policy": {"method": method}}
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    return content


def params_of(method: str, **sections: dict[str, Any]) -> Params:
    return Params.model_validate(content_of(method, **sections))


def test_default_is_ppo() -> None:
    params = Params.model_validate(minimal_params())
    assert params.policy == PolicyConfig(method="ppo") and params.policy.methods == ("ppo",)


@pytest.mark.parametrize(
    ("method", "methods", "stages"),
    [
        ("ppo", ("ppo",), {"sft", "reward_model", "ppo"}),
        ("dpo", ("dpo",), {"sft", "dpo"}),
        ("both", ("ppo", "dpo"), {"sft", "reward_model", "ppo", "dpo"}),
    ],
)
def test_stages_of_a_run(method: str, methods: tuple[str, ...], stages: set[str]) -> None:
    params = params_of(method)
    assert params.policy.methods == methods
    assert {stage for stage in ("sft", "reward_model", "ppo", "dpo") if params.runs(stage)} == stages
    assert params.stage(EvaluationStageConfig).method == methods[0]
    judged = params_of(method, judge={"kind": "reward_model"})
    assert judged.runs("reward_model") and judged.uses_reward_model == ("ppo" in methods)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_without_ppo_has_no_rewards(method: str) -> None:
    endpoint = {"kind": "endpoint", "url": "http://vllm:8000/v1", "model": "m"}
    code = {"kind": "command", "command": ["python", "check.py"]}
    params = params_of(method, ppo={"rewards": [{}, endpoint, code]}, cluster={"allow_user_code": True})
    has_rewards = method != "dpo"
    assert bool(params.rewards) == has_rewards
    assert bool(params.all_asked) == bool(params.asked_by("ppo")) == has_rewards
    assert set(params.runs_user_code) == ({"ppo.rewards.2"} if has_rewards else set())
    assert params.keeps_answers == has_rewards
    assert params.calibrates_with_vllm is False


@pytest.mark.parametrize(
    ("method", "rewards", "share"), [("ppo", EXACT, 0.0), ("dpo", EXACT, 0.4), ("both", EXACT, 0.4), ("ppo", {}, 0.4)]
)
def test_preferences_go_to_whatever_learns_from_them(method: str, rewards: dict[str, Any], share: float) -> None:
    params = params_of(method, ppo={"rewards": rewards}, data={"prompts": KEPT, "weights": {"reward_model": 0.4}})
    assert params.stage(PrepareDataStageConfig).data.weights.reward_model == share


def test_dpo_receives_its_own_sections_and_the_budget_of_its_profile() -> None:
    profiles = {"cpu": {"price_per_hour": 1.0}, "gpu": {"price_per_hour": 8.0}}
    cluster = {"profiles": profiles, "stages": {"dpo": "gpu"}, "budget": 100.0}
    stage = params_of("dpo", dpo={"beta": 0.3}, cluster=cluster).stage(DpoStageConfig)
    assert (stage.dpo.beta, stage.budget.price_per_hour) == (0.3, 8.0)
    assert DpoStageConfig.from_json(stage.canonical_json()) == stage


BETA = {"dpo": {"beta": 0.3}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dpo without preferences": (
        content_of("dpo", data={"preferences": None}),
        "data.preferences is missing, and dpo.loss dpo learns from pairs",
    ),
    "both without preferences": (
        content_of("both", data={"preferences": None, "prompts": KEPT}, ppo={"rewards": EXACT}) | {"judge": EXACT},
        "data.preferences is missing, and dpo.loss dpo learns from pairs",
    ),
    "dpo with a weight of 0": (
        content_of("dpo", data={"weights": {"reward_model": 0}}),
        "data.weights.reward_model is 0, which leaves no preferences for the stage dpo of this run",
    ),
    "both with a weight of 0": (
        content_of("both", data={"weights": {"reward_model": 0}}),
        "data.weights.reward_model is 0, which leaves no preferences for the reward model of this run",
    ),
    "kto without labels": (
        content_of("both", dpo={"loss": "kto"}),
        "dpo.loss is kto, which learns from single answers labeled as desirable or not, and data.desirable_rating",
    ),
    "a loss without a reference, and its setting": (
        content_of("dpo", dpo={"loss": "simpo", "reference_microbatch_tokens": 100}),
        "dpo: reference_microbatch_tokens is set, but loss simpo has no reference",
    ),
    "settings of dpo, and no method": (minimal_params() | BETA, "dpo has settings, but the policy is trained by PPO"),
    "a reward model that dpo does not need": (
        content_of("dpo", reward_model={"use": "/models/rm"}),
        "reward_model.use is /models/rm, but policy.method is dpo, which learns without a reward model",
    ),
    "both, with the reward model as the judge": (
        content_of("both", reward_model={"use": "/rm"}, judge={"kind": "reward_model", "use": "/rm"}),
        "judge.use is /rm, the reward model that PPO is trained with",
    ),
    "dpo under ZeRO-3 with frozen layers": (
        content_of("dpo", model={"num_frozen_layers": 2}, dpo={"training": {"engine": "deepspeed", "zero_stage": 3}}),
        "zero_stage 3 shards the weights of each model",
    ),
    "dpo with other processes than accelerators": (
        content_of(
            "dpo",
            dpo={"training": {"num_processes": 2}},
            cluster={"profiles": {"cpu": {}, "gpu": {"num_accelerators": 4}}, "stages": {"dpo": "gpu"}},
        ),
        "dpo.training.num_processes is 2, and the profile gpu has 4 accelerators",
    ),
    "dpo with a budget and no price": (
        content_of(
            "dpo",
            cluster={
                "profiles": {"cpu": {"price_per_hour": 1.0}, "gpu": {}},
                "stages": {"dpo": "gpu"},
                "budget": 5.0,
            },
        ),
        "the price of dpo is unknown",
    ),
    "ppo of both that contradicts itself": (
        content_of("both", data={"demonstrations": None}, sft={"use": "/sft"}, ppo={"ptx_coef": 0.1}),
        "ppo.ptx_coef mixes in the loss on demonstrations",
    ),
    "another method": (content_of("kto"), "policy.method is 'kto': input should be 'ppo', 'dpo' or 'both'"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_contradiction_is_refused_with_its_reason(content: dict[str, Any], message: str) -> None:
    assert message in error_message(content)


ACCEPTED = {
    "settings of dpo, and ppo on purpose": content_of("ppo", **BETA),
    "kto without labels, in a run without dpo": content_of("ppo", dpo={"loss": "kto"}),
    "no preferences, in a run without dpo": content_of(
        "ppo", data={"preferences": None, "prompts": KEPT}, ppo={"rewards": EXACT}
    )
    | {"judge": EXACT},
    "kto with labels": content_of("dpo", dpo={"loss": "kto"}, data={"desirable_rating": 0.5}),
    "no demonstrations for a ptx loss that is not part of the run": content_of(
        "dpo", data={"demonstrations": None}, sft={"use": "/sft"}, ppo={"ptx_coef": 0.1}
    ),
    "rewards without preferences, in a run without ppo": content_of(
        "dpo", ppo={"rewards": EXACT}, data={"prompts": KEPT}
    ),
    "a budget, and no price of a stage that is not part of the run": content_of(
        "dpo",
        cluster={"profiles": {"cpu": {"price_per_hour": 1.0}, "gpu": {}}, "stages": {"ppo": "gpu"}, "budget": 5.0},
    ),
}


@pytest.mark.parametrize("content", ACCEPTED.values(), ids=ACCEPTED)
def test_settings_of_a_method_that_does_not_run_are_no_contradiction(content: dict[str, Any]) -> None:
    params = Params.model_validate(content)
    assert Params.model_validate(params.model_dump(mode="json")) == params  # params.yaml of the run
