"""Files that rewards refer to are copied into the params, and the pods of ppo get the keys and the network that rewards need."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.rlhf.config.params import Params
from components.rlhf.config.rewards import EndpointReward, FunctionReward, JsonSchemaReward
from components.rlhf.text.errors import InputError
from pipelines.access import secrets_of
from pipelines.placement import egress_of
from pipelines.settings import load_params, settings_of_stage

DATA: dict[str, Any] = {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "preferences", "prompts")}
ENDPOINT = {"kind": "endpoint", "url": "https://api.example.com/v1", "model": "gpt"}
HTTP = {"kind": "http", "url": "http://rewards:5000/get_reward"}
SOURCE = "def score(prompts, responses):\n    return [1.0 for _ in responses]\n"


def load(folder: Path, *rewards: dict[str, Any], **sections: Any) -> Params:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"data": DATA, "ppo": {"rewards": list(rewards)}, **sections}), encoding="utf-8")
    return load_params(path)


def test_texts_replace_files(tmp_path: Path) -> None:
    (tmp_path / "rubric.txt").write_text("Be\n\tkind.\n")
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    (tmp_path / "mine.py").write_text(SOURCE)
    params = load(
        tmp_path,
        {},
        ENDPOINT | {"rubric_file": "rubric.txt"},
        {"kind": "json_schema", "schema_file": "schema.json"},
        {"kind": "function", "function": "mine:score"},
    )
    _, grade, schema, function = params.ppo.rewards
    assert isinstance(grade, EndpointReward) and (grade.rubric, grade.rubric_file) == ("Be\n\tkind.\n", None)
    assert isinstance(schema, JsonSchemaReward) and json.loads(schema.schema_text) == {"type": "object"}
    assert isinstance(function, FunctionReward) and function.source == SOURCE
    # What the stage gets is what was loaded, and it names no file.
    rewards = json.loads(settings_of_stage(params, "ppo"))["ppo"]["rewards"]
    assert [reward["kind"] for reward in rewards] == ["reward_model", "endpoint", "json_schema", "function"]
    assert "schema.json" not in json.dumps(rewards) and "rubric.txt" not in json.dumps(rewards)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (ENDPOINT | {"rubric_file": "none.txt"}, "ppo.rewards.1.rubric_file: none.txt is not a file next to the params file"),
        ({"kind": "json_schema", "schema_file": "none.json"}, "ppo.rewards.1.schema_file: none.json is not a file"),
        ({"kind": "json_schema", "schema_file": "bad.json"}, "ppo.rewards.1.schema_text: it is no JSON schema ("),
        ({"kind": "json_schema", "schema_file": "empty.json"}, "ppo.rewards.1.schema_file: "),
        ({"kind": "function", "function": "nowhere_x:score"}, "ppo.rewards.1.function: there is neither nowhere_x.py next to"),
    ],
)  # fmt: skip
def test_files_that_are_missing_or_wrong(reward: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"type": "objec"}')
    (tmp_path / "empty.json").write_text(" ")
    with pytest.raises(InputError) as error:
        load(tmp_path, {}, reward)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("module", ["mine", "team.mine", "team"])
def test_module_in_the_folder_of_code_needs_no_source(module: str, tmp_path: Path) -> None:
    file = {"mine": "mine.py", "team.mine": "team/mine.py", "team": "team/__init__.py"}[module]
    (tmp_path / "code" / "team").mkdir(parents=True)
    (tmp_path / "code" / file).write_text(SOURCE)
    params = load(tmp_path, {"kind": "function", "function": f"{module}:score"}, code={"path": "code"})
    (reward,) = params.ppo.rewards
    assert isinstance(reward, FunctionReward) and not reward.source and params.code.archive
    with pytest.raises(InputError, match=r"ppo.rewards.0.function: there is neither other.py"):
        load(tmp_path, {"kind": "function", "function": "other:score"}, code={"path": "code"})
    load(tmp_path, {"kind": "function", "function": "other:score"}, code={"path": "s3://bucket/code"})  # unknown here


def keys_of(stage: str, params: Params) -> dict[str, set[str]]:
    return {
        secret.name: set(secret.variables) for secret in secrets_of(stage, params, []) if secret.name == "rlhf-judge"
    }


def test_ppo_gets_the_keys_and_the_network_of_its_rewards_alone(tmp_path: Path) -> None:
    params = load(
        tmp_path,
        {},
        ENDPOINT,
        ENDPOINT | {"name": "other", "api_key_variable": "OTHER_KEY"},
        HTTP | {"token_variable": "REWARD_TOKEN"},
        judge={**ENDPOINT, "api_key_variable": "JUDGE_KEY"},
    )
    assert keys_of("ppo", params) == {"rlhf-judge": {"OPENAI_API_KEY", "OTHER_KEY", "REWARD_TOKEN"}}
    for stage in ("judge", "evaluation"):
        assert keys_of(stage, params) == {"rlhf-judge": {"JUDGE_KEY"}}
    assert keys_of("sft", params) == {}
    reached = {stage for stage in ("sft", "reward_model", "judge", "ppo", "evaluation") if egress_of(stage, params, [])}
    assert reached == {"judge", "ppo", "evaluation"}
    assert params.keeps_answers


def test_server_without_a_key_needs_the_network_and_no_secret(tmp_path: Path) -> None:
    params = load(tmp_path, {}, HTTP)
    assert keys_of("ppo", params) == {} and egress_of("ppo", params, []) and not egress_of("judge", params, [])
    assert not params.keeps_answers
    alone = load(tmp_path, {}, {"kind": "repetition"})
    assert not egress_of("ppo", alone, [])


def test_answers_in_s3_need_the_keys_of_s3(tmp_path: Path) -> None:
    def names(*rewards: dict[str, Any]) -> set[str]:
        storage = {"answers_uri": "s3://bucket/answers"}
        return {secret.name for secret in secrets_of("ppo", load(tmp_path, *rewards, storage=storage), [])}

    assert "rlhf-s3" in names(ENDPOINT | {"weight": 1}) and "rlhf-s3" not in names({}, HTTP)
