import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.dpo import DpoStageConfig
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.config.model import SamplingConfig, TrainingConfig
from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoConfig, PpoStageConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.rollout import RolloutConfig
from components.rlhf.config.sft import SftStageConfig
from pipelines.profiles import resolve_profiles

PARAMS = Path(__file__).resolve().parents[3] / "pipelines/params"


def minimal_params() -> dict[str, Any]:
    """The required parameters."""
    return {
        "data": {
            "demonstrations": {"path": "demos.jsonl"},
            "preferences": {"path": "pairs.jsonl"},
            "prompts": {"path": "prompts.jsonl"},
        }
    }


def with_value(path: str, value: object) -> dict[str, Any]:
    content = minimal_params()
    *sections, name = path.split(".")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return content


def error_message(content: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Params.model_validate(content)
    return explain_validation_error(caught.value, Params)


# --- what is accepted ---


def test_defaults_are_valid() -> None:
    params = Params.model_validate(minimal_params())
    assert params.seed == 0
    assert params.ppo.rollout.sampling == SamplingConfig()
    # Defaults are validated too, so that an integer in a float field is a float in every digest.
    assert type(params.ppo.kl_horizon) is float


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_params_are_valid(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content.pop("presets", None)  # tested in tests/pipelines/test_settings.py
    Params.model_validate(resolve_profiles(content))


def test_settings_are_frozen() -> None:
    params = Params.model_validate(minimal_params())
    with pytest.raises(ValidationError, match="frozen"):
        params.sft.num_epochs = 2


def test_demonstrations_are_optional_with_own_sft_model() -> None:
    content = minimal_params() | {"sft": {"use": "my-model"}}
    del content["data"]["demonstrations"]
    assert Params.model_validate(content).data.demonstrations is None


# --- canonical JSON ---


def test_canonical_json_of_a_stage() -> None:
    settings = NotifyStageConfig(preset="mödel", ui_url=None)
    assert settings.canonical_json() == '{"params":"","preset":"mödel","ui_url":null}'


def test_canonical_json_does_not_depend_on_key_order() -> None:
    one = Params.model_validate(minimal_params() | {"seed": 3, "preset": "x"})
    other = Params.model_validate({"preset": "x", "seed": 3} | minimal_params())
    assert one.canonical_json() == other.canonical_json()
    assert one.canonical_json() != Params.model_validate(minimal_params() | {"seed": 4, "preset": "x"}).canonical_json()


def test_canonical_json_round_trips() -> None:
    params = Params.model_validate(with_value("ppo.training.learning_rate", 3e-7))
    parsed = Params.from_json(params.canonical_json())
    assert parsed == params
    assert parsed.canonical_json() == params.canonical_json()


def test_stop_strings_may_have_line_breaks() -> None:
    params = Params.model_validate(with_value("ppo.rollout.sampling.stop", ["\n\n", "END\t"]))
    assert Params.from_json(params.canonical_json()).ppo.rollout.sampling.stop == ("\n\n", "END\t")


def test_integers_stay_integers() -> None:
    content = json.loads(Params.model_validate(with_value("ppo.num_iterations", 7)).canonical_json())
    assert repr(content["ppo"]["num_iterations"]) == "7"
    assert repr(content["ppo"]["kl_horizon"]) == "10000.0"


# --- what is refused, and the error messages ---


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("sead", "seed"),
        ("gate.min_winrate", "gate.min_win_rate"),
        ("data.prompts.formt", "data.prompts.format"),
        ("sft.training.learningrate", "sft.training.learning_rate"),
        ("ppo.rollout.sampling.temprature", "ppo.rollout.sampling.temperature"),
        ("evaluation.sampling.max_new_token", "evaluation.sampling.max_new_tokens"),  # in an optional section
        ("data.demonstrations.colums", "data.demonstrations.columns"),
    ],
)
def test_misspelled_key_gets_closest_match(path: str, match: str) -> None:
    assert error_message(with_value(path, 1)) == f"{path} is not a parameter; did you mean {match}?"


def test_unknown_key_gets_all_valid_keys() -> None:
    message = error_message(with_value("gate.xyzzy", 1))
    known = "min_win_rate, max_kl, min_prompts, checks, approval, approval_hours"
    assert message == f"gate.xyzzy is not a parameter; valid here: {known}."


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", -1, "seed is -1: input should be greater than or equal to 0."),
        ("seed", 2**31, "seed is 2147483648: input should be less than 2147483648."),
        ("ppo.num_iterations", 0, "ppo.num_iterations is 0: "),
        ("ppo.num_iterations", 2.5, "ppo.num_iterations is 2.5: "),
        ("ppo.kl_coef", -0.1, "ppo.kl_coef is -0.1: "),
        ("ppo.kl_coef", float("inf"), "ppo.kl_coef is inf: "),
        ("ppo.kl_coef", float("nan"), "ppo.kl_coef is nan: "),
        ("gate.min_win_rate", 1.1, "gate.min_win_rate is 1.1: "),
        ("gate.min_win_rate", float("nan"), "gate.min_win_rate is nan: "),
        ("sft.training.learning_rate", 0, "sft.training.learning_rate is 0: "),
        (
            "sft.training.engine",
            "deepspeeed",
            "sft.training.engine is 'deepspeeed': input should be 'torch' or 'deepspeed'.",
        ),
        ("sft.training.zero_stage", 0, "sft.training.zero_stage is 0: input should be 1, 2 or 3."),
        ("ppo.training.num_processes", 3, "ppo: minibatch is 32, which 3 processes (training.num_processes) cannot"),
        ("data.template", "jinja", "data.template is 'jinja': input should be 'auto', 'plain' or 'chat'."),
        ("data.prompts", None, "data.prompts is None: "),
        ("data.prompts.columns", {"prompt": 3}, "data.prompts.columns.prompt is 3: "),
        ("model.lora", {"rank": 0}, "model.lora.rank is 0: "),
        ("model.lora", {"quantization": "nf5"}, "model.lora.quantization is 'nf5': "),
        ("model.lora", {"target_modules": []}, "model.lora.target_modules is []: "),
        ("sft", None, "sft is None: "),
        ("preset", 3, "preset is 3: "),
        ("ppo.rollout.sampling.top_p", 0, "ppo.rollout.sampling.top_p is 0: input should be greater than 0."),
        ("ppo.rollout.sampling.top_p", 1.01, "ppo.rollout.sampling.top_p is 1.01: "),
        ("ppo.rollout.sampling.top_p", float("nan"), "ppo.rollout.sampling.top_p is nan: "),
        ("ppo.rollout.sampling.top_k", -1, "ppo.rollout.sampling.top_k is -1: "),
        ("ppo.rollout.sampling.top_k", 1.5, "ppo.rollout.sampling.top_k is 1.5: "),
        ("ppo.rollout.sampling.min_p", 1, "ppo.rollout.sampling.min_p is 1: input should be less than 1."),
        ("ppo.rollout.sampling.min_p", -0.1, "ppo.rollout.sampling.min_p is -0.1: "),
        ("evaluation.sampling.repetition_penalty", 0, "evaluation.sampling.repetition_penalty is 0: "),
        ("evaluation.sampling.repetition_penalty", float("inf"), "evaluation.sampling.repetition_penalty is inf: "),
        ("evaluation.sampling.stop", "END", "evaluation.sampling.stop is 'END': input should be a valid tuple."),
        ("evaluation.sampling.stop", ["a", ""], "evaluation.sampling.stop.1 is '': "),
        ("evaluation.sampling.stop", list("abcdefghi"), "evaluation.sampling.stop is ['a', 'b', "),
        (
            "evaluation.sampling.stop",
            ["a\x00"],
            "evaluation.sampling.stop: it contains the character '\\x00'; remove it.",
        ),
    ],
)
def test_invalid_value_is_reported(path: str, value: object, message: str) -> None:
    assert error_message(with_value(path, value)).startswith(message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ppo.minibatch", 24, "ppo: minibatch is 24, which does not divide the rollout batch of 64"),
        ("ppo.patience", 2, "ppo: patience counts evaluations on the validation prompts; set eval_every above 0."),
        (
            "ppo.keep",
            "best",
            "ppo: keep is best, which evaluations on the validation prompts find; set eval_every above 0.",
        ),
        (
            "ppo",
            {"kl_coef": 0, "kl_target": 6},
            "ppo: kl_target adapts kl_coef by factors, and kl_coef is 0; set it above 0",
        ),
        ("ppo.kl_target_per", "tokens", "ppo.kl_target_per is 'tokens': "),
        ("ppo.guard", "stop", "ppo.guard is 'stop': expected a section with the keys action, max_kl, "),
        ("ppo.guard", {"action": "halt"}, "ppo.guard.action is 'halt': "),
        ("ppo.guard", {"max_kl": 0}, "ppo.guard.max_kl is 0: "),
        ("ppo.dual_clip", 1.0, "ppo: dual_clip is 1.0, but must be above 1."),
        ("ppo.clip_range_high", 0.1, "ppo: clip_range_high is below clip_range"),
        ("ppo.importance_clip", [5, 0.5], "ppo: importance_clip is [5.0, 0.5], with the lower bound above the upper"),
        (
            "ppo",
            {"importance_clip": [0.5, 5], "old_logprobs": "engine"},
            "ppo: importance_clip corrects for the difference",
        ),
        ("ppo.rollout.sampling.min_new_tokens", 65, "ppo.rollout.sampling: min_new_tokens is 65, more than"),
        (
            "ppo",
            {"training": {"engine": "deepspeed", "zero_stage": 3}, "critic": {"trains": "head"}},
            "the parameters: zero_stage 3 shards the weights of each model, so models cannot share weights as they do with "
            "critic.trains: head; set zero_stage to 2",
        ),
        ("sft.training", {"offload_optimizer": True}, "sft.training: offload_optimizer needs the engine deepspeed"),
        (
            "ppo.rollout",
            {"engine": "vllm", "sampling": {"temperature": 2.5}},
            "ppo: rollout.sampling.temperature is 2.5",
        ),
        (
            "ppo.rollout",
            {"engine": "vllm", "vllm": {"tensor_parallel_size": 2}},
            "ppo: rollout.vllm.tensor_parallel_size is 2",
        ),
        ("data.max_tokens", 512, "the parameters: data.max_prompt_tokens leaves no tokens for a completion"),
        ("data.demonstrations", None, "the parameters: data.demonstrations is missing; set it, or"),
    ],
)
def test_contradictory_values_are_reported(path: str, value: object, message: str) -> None:
    assert error_message(with_value(path, value)).startswith(message)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ppo.minibatch", 64),
        ("ppo.dual_clip", 1.01),
        ("ppo.clip_range_high", 0.2),
        ("ppo.importance_clip", [1, 1]),
        ("ppo.rollout.sampling.min_new_tokens", 64),
        ("data.max_tokens", 513),
        ("gate.min_win_rate", 1),
        ("ppo.kl_coef", 0),
        ("seed", 2**31 - 1),
    ],
)
def test_values_at_the_limits_are_valid(path: str, value: object) -> None:
    Params.model_validate(with_value(path, value))


def test_patience_with_evaluations_is_valid() -> None:
    assert PpoConfig(eval_every=5, patience=2).patience == 2


def test_rollout_batch_includes_samples_per_prompt() -> None:
    rollout = RolloutConfig(num_prompts=3, samples_per_prompt=8)
    assert PpoConfig(rollout=rollout, minibatch=12).minibatch == 12
    with pytest.raises(ValidationError, match="rollout batch of 24"):
        PpoConfig(rollout=rollout, minibatch=16)


def test_all_errors_are_reported_at_once() -> None:
    content = with_value("gate.max_kl", -1) | {"sead": 1}
    del content["data"]["prompts"]
    message = error_message(content)
    assert message.split("; ")[0] == "data.prompts is missing"
    assert "gate.max_kl is -1: " in message
    assert message.endswith("did you mean seed?")


def test_errors_in_settings_of_a_stage_are_explained() -> None:
    with pytest.raises(ValidationError) as caught:
        ImportModelStageConfig.model_validate({"kind": "base_model", "sorce": "x"})
    assert (
        explain_validation_error(caught.value, ImportModelStageConfig)
        == "source is missing; sorce is not a parameter; did you mean source?"
    )


# --- settings of each stage ---

SECTIONS = {
    PrepareDataStageConfig: {"data", "num_evaluation_prompts", "seed"},
    SftStageConfig: {"model", "sft", "checkpoint", "budget", "seed"},
    RewardModelStageConfig: {
        "stage_name",
        "model",
        "reward_model",
        "sampling",
        "rollout",
        "checkpoint",
        "budget",
        "seed",
    },
    JudgeStageConfig: {"model", "judge", "code_digest", "seed"},
    PpoStageConfig: {"model", "ppo", "checkpoint", "budget", "max_kl", "code_digest", "seed"},
    DpoStageConfig: {"model", "dpo", "checkpoint", "budget", "seed"},
    EvaluationStageConfig: {
        "stage_name",
        "method",
        "model",
        "evaluation",
        "sampling",
        "rollout",
        "gate",
        "judge",
        "check_names",
        "environment",
        "code_digest",
        "seed",
    },
}


@pytest.mark.parametrize(("stage", "sections"), SECTIONS.items(), ids=lambda part: getattr(part, "__name__", ""))
def test_stage_receives_only_its_sections(stage: type[BaseConfig], sections: set[str]) -> None:
    params = Params.model_validate(with_value("seed", 5))
    config = params.stage(stage)
    assert set(json.loads(config.canonical_json())) == sections
    for name in sections & set(Params.model_fields):
        assert getattr(config, name) == getattr(params, name)


@pytest.mark.parametrize("stage", [SftStageConfig, RewardModelStageConfig, JudgeStageConfig, PrepareDataStageConfig])
def test_ppo_settings_do_not_affect_earlier_stages(stage: type[BaseConfig]) -> None:
    """Their digests, and with them KFP's cache and checkpoints, must not change while PPO is tuned."""
    before, after = (Params.model_validate(with_value("ppo.kl_coef", value)).stage(stage) for value in (0.05, 0.5))
    assert before.canonical_json() == after.canonical_json()


def test_reward_model_is_calibrated_with_sampling_of_ppo() -> None:
    params = Params.model_validate(with_value("ppo.rollout.sampling.temperature", 0.7))
    assert params.stage(RewardModelStageConfig).sampling.temperature == 0.7


def test_evaluation_sampling_defaults_to_that_of_ppo() -> None:
    content = with_value("ppo.rollout.sampling.temperature", 0.7)
    assert Params.model_validate(content).stage(EvaluationStageConfig).sampling.temperature == 0.7
    content["evaluation"] = {"sampling": {"temperature": 0.1}}
    assert Params.model_validate(content).stage(EvaluationStageConfig).sampling.temperature == 0.1
    assert Params.model_validate(content).stage(RewardModelStageConfig).sampling.temperature == 0.7


def test_prepare_data_receives_number_of_evaluation_prompts() -> None:
    params = Params.model_validate(with_value("evaluation.num_prompts", 17))
    assert params.stage(PrepareDataStageConfig).num_evaluation_prompts == 17


def test_default_learning_rate_of_actor_is_lower() -> None:
    assert PpoConfig().training.learning_rate == 1e-6
    assert TrainingConfig().learning_rate == 1e-5


@pytest.mark.parametrize(
    ("ppo", "keeps_best", "max_kl"),
    [
        ({}, False, None),
        ({"eval_every": 5}, True, 7.5),
        ({"eval_every": 5, "keep": "best"}, True, 7.5),
        ({"eval_every": 5, "keep": "last"}, False, None),
        ({"guard": {"action": "stop"}}, False, 7.5),
        ({"eval_every": 5, "keep": "last", "guard": {"action": "rollback"}}, False, 7.5),
    ],
)
def test_limit_of_the_gate_reaches_ppo_only_where_it_matters(
    ppo: dict[str, object], keeps_best: bool, max_kl: float | None
) -> None:
    """So that another limit of the gate does not train again a policy that it could not change."""
    params = Params.model_validate(with_value("ppo", ppo) | {"gate": {"max_kl": 7.5}})
    stage = params.stage(PpoStageConfig)
    assert (stage.ppo.keeps_best, stage.max_kl) == (keeps_best, max_kl)
    assert PpoStageConfig.from_json(stage.canonical_json()) == stage


def test_best_policy_needs_validation_prompts() -> None:
    settings = with_value("ppo", {"eval_every": 5, "keep": "best"})
    settings["data"]["num_validation_prompts"] = 0
    assert error_message(settings).startswith(
        "the parameters: ppo.keep is best, which evaluations on the validation prompts"
    )
    settings["ppo"]["keep"] = None
    assert Params.model_validate(settings).ppo.keeps_best  # the stage exports the last policy, and says so
