"""Settings of rewards: one or several, each with the keys of its kind and its weight."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoConfig, PpoStageConfig
from components.rlhf.config.rewards import KINDS, MAX_REWARDS_BYTES, RewardModelReward
from components.rlhf.config.scoring import RUNS_USER_CODE, VERIFIABLE, column_of

DATA: dict[str, Any] = {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "preferences", "prompts")}
DATA["prompts"] |= {"keep": ["answer", "target", "schema"]}
MINIMAL: dict[str, dict[str, Any]] = {
    "reward_model": {"kind": "reward_model"},
    "function": {"kind": "function", "function": "mine:score"},
    "http": {"kind": "http", "url": "http://rewards:5000/get_reward"},
    "exact_match": {"kind": "exact_match"},
    "regex": {"kind": "regex", "pattern": "yes"},
    "numeric": {"kind": "numeric"},
    "json_schema": {"kind": "json_schema", "schema_text": {"type": "object"}},
    "command": {"kind": "command", "command": ["python", "check.py"]},
    "length": {"kind": "length", "buffer": 8},
    "repetition": {"kind": "repetition"},
    "endpoint": {"kind": "endpoint", "url": "http://vllm:8000/v1", "model": "m"},
    "environment": {"kind": "environment"},
}
ENVIRONMENT = {"kind": "calculator"}  # that the reward of this kind needs


def params_with(rewards: Any, **sampling: Any) -> Params:
    ppo = {"rewards": rewards, "rollout": {"sampling": sampling}}
    kinds = [
        reward.get("kind")
        for reward in (rewards if isinstance(rewards, list) else [rewards])
        if isinstance(reward, dict)
    ]
    ppo |= {"environment": ENVIRONMENT} if "environment" in kinds else {}
    return Params.model_validate({"data": DATA, "ppo": ppo, "cluster": {"allow_user_code": True}})


def error_message(rewards: Any, **sampling: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        params_with(rewards, **sampling)
    return explain_validation_error(caught.value, Params)


def test_default_is_the_reward_model_alone() -> None:
    assert Params.model_validate({"data": DATA}).ppo.rewards == (RewardModelReward(),)
    assert params_with({}).ppo.rewards == params_with([{}]).ppo.rewards == (RewardModelReward(),)
    assert PpoConfig().uses_reward_model


def test_minimal_settings_name_every_kind() -> None:
    assert set(MINIMAL) == set(KINDS)
    kinds = {kind.__name__ for kind in (*VERIFIABLE, *RUNS_USER_CODE)}
    assert kinds == {"ExactMatch", "Regex", "Numeric", "JsonSchema", "Command", "Function"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_in_a_list_and_after_a_round_trip(kind: str) -> None:
    settings = MINIMAL[kind] | {"name": "mine", "weight": -0.5}
    alone, in_list = params_with(settings), params_with([settings, {"kind": "repetition"}])
    (reward,) = alone.ppo.rewards
    assert type(reward) is KINDS[kind] and reward.title == "mine" and reward.weight == -0.5
    assert in_list.ppo.rewards[0] == reward and params_with(MINIMAL[kind]).ppo.rewards[0].title == kind
    assert alone.ppo.uses_reward_model == (kind == "reward_model")
    assert Params.from_json(alone.canonical_json()) == alone
    assert column_of(reward) == ("answer" if kind in ("exact_match", "numeric") else None)


def test_stage_gets_the_rewards() -> None:
    params = params_with([MINIMAL["numeric"], MINIMAL["length"]])
    assert params.stage(PpoStageConfig).ppo.rewards == params.ppo.rewards


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "ppo: rewards is an empty list; name a reward, or remove it for the trained reward model."),
        ({"kind": "numeri"}, "ppo.rewards.0 is {'kind': 'numeri'}: kind is not one of reward_model, function, http,"),
        ("numeric", "ppo.rewards.0 is 'numeric': kind is not one of "),
        ([{}, None], "ppo.rewards.1 is None: kind is not one of "),
        ([{}, {"kind": "numeric", "colum": "a"}], "ppo.rewards.1.colum is not a parameter; did you mean ppo.rewards.1.column?"),
        ({"kind": "length", "xyzzy": "a", "buffer": 1}, "ppo.rewards.0.xyzzy is not a parameter; valid here: name, weight, kind"),
        ([{}, {}], "ppo: two rewards are named reward_model; give them different names (rewards.NUMBER.name)."),
        ([{}, {"name": "b"}], "ppo: rewards has two reward models, and there can be one; remove one of them."),
        ([{"weight": 0}], "ppo: every reward has the weight 0, so nothing is learned; raise a weight."),
        ({"weight": float("nan")}, "ppo.rewards.0.weight is nan: "),
        ({"weight": float("inf")}, "ppo.rewards.0.weight is inf: "),
        ({"name": "a b"}, "ppo.rewards.0.name is 'a b': "),
        ([MINIMAL["repetition"] | {"name": f"r{i}"} for i in range(17)], "ppo.rewards is "),
        ({"kind": "regex", "pattern": "(a"}, "ppo.rewards.0.pattern: it is no regular expression (missing )"),
        ({"kind": "regex", "pattern": "a{1,99999999999}"}, "ppo.rewards.0.pattern: it is no regular expression"),
        ({"kind": "regex", "pattern": ""}, "ppo.rewards.0.pattern is '': "),
        ({"kind": "json_schema"}, "ppo.rewards.0: set one of schema_file, schema_text and"),
        ({"kind": "json_schema", "schema_text": "{}", "column": "schema"}, "ppo.rewards.0: set one of schema_file, schema_text and"),
        ({"kind": "json_schema", "schema_text": "{"}, "ppo.rewards.0.schema_text: it is no JSON schema ("),
        ({"kind": "json_schema", "schema_text": {"type": "objec"}}, "ppo.rewards.0.schema_text: it is no JSON schema ($.type: "),
        ({"kind": "json_schema", "schema_text": "[]"}, "ppo.rewards.0.schema_text: it is no JSON schema (it is neither an object"),
        ({"kind": "json_schema", "schema_text": "{\"not\":" * 5000}, "ppo.rewards.0.schema_text: it is no JSON schema ("),
        ({"kind": "http", "url": "rewards:5000"}, "ppo.rewards.0.url: write it as http://HOST:5000/get_reward."),
        ({"kind": "http", "url": "http://u:p@h/"}, "ppo.rewards.0.url: credentials are not allowed"),
        ({"kind": "http", "url": "http://h/", "token_variable": "a b"}, "ppo.rewards.0.token_variable is 'a b': "),
        ({"kind": "http", "url": "http://h/", "batch_size": 0}, "ppo.rewards.0.batch_size is 0: "),
        ({"kind": "endpoint", "url": "http://h/v1"}, "ppo.rewards.0.model is missing."),
        ({"kind": "endpoint", "url": "http://h/v1", "model": "m", "extra_body": {"n": 2}}, "ppo.rewards.0.extra_body: n is set for each"),
        ({"kind": "function", "function": "mine.py"}, "ppo.rewards.0.function is 'mine.py': "),
        ({"kind": "function", "function": "m:f", "source": "x" * MAX_REWARDS_BYTES}, "ppo: the rewards take "),
        ({"kind": "command", "command": []}, "ppo.rewards.0.command is []: "),
        ({"kind": "command", "command": ["a"], "score": "stderr"}, "ppo.rewards.0.score is 'stderr': "),
        ({"kind": "length"}, "ppo.rewards.0.buffer is missing."),
        ({"kind": "length", "buffer": 0}, "ppo.rewards.0.buffer is 0: "),
        ({"kind": "repetition", "ngram": 0}, "ppo.rewards.0.ngram is 0: "),
    ],
)  # fmt: skip
def test_invalid_rewards(rewards: Any, message: str) -> None:
    reported = error_message(rewards)
    assert reported.startswith(message)
    assert len(reported) < 800 and reported.isprintable()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"buffer": 33},
            "ppo: rewards.0 leaves no length without a penalty: max_tokens 32 - buffer 33 is below min_tokens 0",
        ),
        (
            {"buffer": 8, "min_tokens": 25},
            "ppo: rewards.0 leaves no length without a penalty: max_tokens 32 - buffer 8",
        ),
        ({"buffer": 8, "max_tokens": 40}, "ppo: rewards.0 never penalizes: responses have at most 32 tokens"),
    ],
)
def test_lengths_that_contradict_the_longest_response(section: dict[str, int], message: str) -> None:
    assert error_message({"kind": "length", **section}, max_new_tokens=32).startswith(message)


def test_lengths_that_do_not() -> None:
    for section in (
        {"buffer": 32},
        {"buffer": 8, "min_tokens": 24},
        {"buffer": 9, "max_tokens": 40},
        {"buffer": 2, "max_tokens": 9},
    ):
        params_with({"kind": "length", **section}, max_new_tokens=32)
    params_with({"kind": "length", "buffer": 8, "max_tokens": 40, "min_tokens": 4}, max_new_tokens=32)


def test_schema_as_a_section_is_text() -> None:
    schema = {"type": "object", "properties": {"naïve": {"type": "string"}}}
    (reward,) = params_with({"kind": "json_schema", "schema_text": schema}).ppo.rewards
    assert json.loads(reward.model_dump()["schema_text"]) == schema
