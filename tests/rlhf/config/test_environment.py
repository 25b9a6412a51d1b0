"""Settings of environments, and what cannot be together with them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from components.rlhf.config.environment import CalculatorEnvironment, FunctionEnvironment, with_observations
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.model import SamplingConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoConfig, PpoStageConfig
from components.rlhf.data.records import Prompt
from components.rlhf.environments.user import UserHost
from components.rlhf.text.errors import InputError
from pipelines.settings import import_settings, load_params, settings_of_stage

DATA: dict[str, Any] = {
    "demonstrations": {"path": "d.jsonl"},
    "prompts": {"path": "p.jsonl", "keep": ["answer"]},
    "preferences": {"path": "pairs.jsonl"},
    "max_prompt_tokens": 10,
    "max_tokens": 20,
}
CALCULATOR = {"kind": "calculator", "max_turns": 3, "max_observation_tokens": 16}
EXACT = {"kind": "exact_match"}


def params_with(environment: Any, *, sections: dict[str, Any] | None = None, **ppo: Any) -> Params:
    rewards = ppo.pop("rewards", EXACT)
    content = {"data": DATA, "judge": EXACT, "ppo": {"environment": environment, "rewards": rewards, **ppo}}
    return Params.model_validate(content | {"cluster": {"allow_user_code": True}} | (sections or {}))


def error_of(environment: Any, **options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        params_with(environment, **options)
    return explain_validation_error(caught.value, Params)


def test_both_stages_that_sample_get_the_environment() -> None:
    params = params_with(CALCULATOR)
    for stage in (PpoStageConfig, EvaluationStageConfig):
        config = params.stage(stage)
        found = config.ppo.environment if isinstance(config, PpoStageConfig) else config.environment
        assert found == CalculatorEnvironment(kind="calculator", max_turns=3, max_observation_tokens=16)
    assert Params.model_validate_json(params.canonical_json()) == params
    assert Params.model_validate({"data": DATA}).ppo.environment is None


def test_longest_response_has_all_observations() -> None:
    params = params_with(CALCULATOR, rollout={"sampling": {"max_new_tokens": 30, "stop": ["\n", "</calc>"]}})
    assert params.ppo.longest_sampling.max_new_tokens == 30 + 2 * 16
    assert params.ppo.longest_sampling.stop == ("\n", "</calc>")
    assert params.stage(EvaluationStageConfig).longest_sampling.max_new_tokens == 62
    assert '"max_sequence_tokens":72' in import_settings(params, "base_model", "folder")
    sampling = SamplingConfig()
    assert with_observations(sampling, None) is sampling


VLLM_2 = {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}}


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"kind": "chess"}, {}, "ppo.environment is {'kind': 'chess'}: kind is not one of calculator, function; correct it"),
        ({}, {}, "ppo.environment is {}: kind is not one of calculator, function"),
        (CALCULATOR | {"max_turn": 2}, {}, "ppo.environment.max_turn is not a parameter; did you mean ppo.environment.max_turns?"),
        (CALCULATOR | {"max_turns": 0}, {}, "ppo.environment.max_turns is 0"),
        ({"kind": "function"}, {}, "ppo.environment.function is missing"),
        (CALCULATOR, {"sections": {"policy": {"method": "both"}}}, "ppo.environment plays turns, which DPO does not learn"),
        (CALCULATOR, {"sections": {"policy": {"method": "dpo"}}}, "policy.method is dpo; set it to ppo, or remove ppo.environment"),
        ({"kind": "function", "function": "mine"}, {}, "ppo.environment.function is 'mine'"),
        (None, {"rewards": [{"kind": "environment"}]}, "rewards.0 is the reward of the environment, and there is none; set environment"),
        (CALCULATOR, {"rollout": {"sampling": {"min_new_tokens": 2}}}, "rollout.sampling.min_new_tokens is 2, which would hold for"),
        (
            CALCULATOR,
            {"sections": {"evaluation": {"sampling": {"min_new_tokens": 1}}}},
            "evaluation.sampling.min_new_tokens is 1, which would hold for each turn",
        ),
        (
            CALCULATOR,
            {"rollout": VLLM_2, "training": {"num_processes": 2}, "sections": {"evaluation": {"num_processes": 2}}},
            "rollout.vllm.tensor_parallel_size is 2, but with an environment ranks have different numbers of turns",
        ),
        (
            CALCULATOR,
            {"sections": {"evaluation": {"rollout": VLLM_2, "num_processes": 2}}},
            "evaluation.rollout.vllm.tensor_parallel_size is 2, but with an environment",
        ),
        (
            {"kind": "function", "function": "mine:Game", "source": "#" * 13_000},
            {},
            "the environment takes 13,191 bytes as JSON, and 12,288 are possible; put its module into the folder of code.path",
        ),
        (CALCULATOR, {"rollout": {"sampling": {"stop": [*"abcdefgh"]}}}, "have 9 stop strings together, and 8 are possible"),
        (
            CALCULATOR,
            {"rewards": [{}], "sections": {"judge": {}}},
            "reward_model.num_calibration_samples measures the rewards of responses without the environment",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be(environment: Any, options: dict[str, Any], message: str) -> None:
    assert message in error_of(environment, **options)


def test_reward_model_without_calibration_scores_what_is_said_in_turns() -> None:
    sections = {"judge": {}, "reward_model": {"num_calibration_samples": 0}}
    assert params_with(CALCULATOR, rewards=[{}], sections=sections).ppo.uses_reward_model


def test_module_of_the_environment_travels_in_the_settings_and_is_the_users_code(tmp_path: Path) -> None:
    source = "class Game:\n    pass\n"
    (tmp_path / "mine.py").write_text(source)
    content = {
        "data": DATA,
        "judge": EXACT,
        "ppo": {"rewards": EXACT, "environment": {"kind": "function", "function": "mine:Game"}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    params = load_params(tmp_path / "run.yaml")
    assert isinstance(params.ppo.environment, FunctionEnvironment) and params.ppo.environment.source == source
    assert params.runs_user_code == {"ppo.environment": "function"}
    for stage in ("ppo", "evaluation"):
        assert "class Game" in settings_of_stage(params, stage)
    content["ppo"]["environment"]["function"] = "nowhere_x:Game"  # type: ignore[index]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"ppo.environment.function: there is neither nowhere_x.py next to"):
        load_params(tmp_path / "run.yaml")


def test_settings_and_class_of_the_documentation_work() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "environments.md").read_text(encoding="utf-8")
    snippets = {
        kind: [part.partition("```")[0] for part in page.split(f"```{kind}\n")[1:]] for kind in ("yaml", "python")
    }
    calculator, own = (PpoConfig.model_validate(yaml.safe_load(text)["ppo"]) for text in snippets["yaml"])
    assert calculator.environment and own.environment and len(snippets["python"]) == 1
    environment = own.environment.model_copy(update={"source": snippets["python"][0]})
    assert isinstance(environment, FunctionEnvironment)
    host = UserHost(environment)
    assert host.reset({0: Prompt(prompt="?", columns={"secret": "7"})}) == {}
    steps = [host.step({0: text})[0] for text in ("3\n", "nine", "7\n")]
    host.close()
    assert [(step.observation, step.reward, step.done) for step in steps] == [
        (" higher\n", 0.0, False),
        (" higher\n", 0.0, False),
        (" lower\n", 1.0, True),
    ]
