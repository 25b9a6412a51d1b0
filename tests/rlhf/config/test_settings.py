import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.config.model import SamplingConfig, TrainingConfig
from components.rlhf.config.params import Params, explain_validation_error
from components.rlhf.config.ppo import PpoConfig, PpoStageConfig, RolloutConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.sft import SftStageConfig
from pipelines.profiles import resolve_profiles

PARAMS = Path(__file__).resolve().parents[3] / "pipelines/params"


def smallest() -> dict[str, Any]:
    """The least that a params file must say."""
    return {
        "data": {
            "demonstrations": {"path": "demos.jsonl"},
            "preferences": {"path": "pairs.jsonl"},
            "prompts": {"path": "prompts.jsonl"},
        }
    }


def with_value(path: str, value: object) -> dict[str, Any]:
    content = smallest()
    *sections, name = path.split(".")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return content


def complaint(content: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Params.model_validate(content)
    return explain_validation_error(caught.value, Params)


# --- what is accepted ---


def test_defaults_are_valid() -> None:
    params = Params.model_validate(smallest())
    assert params.seed == 0
    assert params.ppo.rollout.sampling == SamplingConfig()
    # Defaults are validated like anything else, so a whole number in a float field is a float in every digest.
    assert type(params.ppo.kl_horizon) is float


@pytest.mark.parametrize("path", sorted(PARAMS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_params_are_valid(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content.pop("presets", None)  # tests/pipelines/test_settings.py lays them over the file
    Params.model_validate(resolve_profiles(content))


def test_values_never_change() -> None:
    params = Params.model_validate(smallest())
    with pytest.raises(ValidationError, match="frozen"):
        params.sft.num_epochs = 2


def test_demonstrations_may_be_missing_where_a_model_replaces_them() -> None:
    content = smallest() | {"sft": {"use": "my-model"}}
    del content["data"]["demonstrations"]
    assert Params.model_validate(content).data.demonstrations is None


# --- canonical JSON ---


def test_canonical_json_by_hand() -> None:
    settings = ImportModelStageConfig(kind="base_model", source="mödel")
    assert settings.canonical_json() == '{"kind":"base_model","revision":null,"source":"mödel"}'


def test_canonical_json_is_the_same_text_whatever_the_order_of_keys() -> None:
    one = Params.model_validate(smallest() | {"seed": 3, "preset": "x"})
    other = Params.model_validate({"preset": "x", "seed": 3} | smallest())
    assert one.canonical_json() == other.canonical_json()
    assert one.canonical_json() != Params.model_validate(smallest() | {"seed": 4, "preset": "x"}).canonical_json()


def test_canonical_json_round_trips() -> None:
    params = Params.model_validate(with_value("ppo.training.learning_rate", 3e-7))
    again = Params.from_json(params.canonical_json())
    assert again == params
    assert again.canonical_json() == params.canonical_json()


def test_integers_stay_integers() -> None:
    content = json.loads(Params.model_validate(with_value("ppo.num_iterations", 7)).canonical_json())
    assert repr(content["ppo"]["num_iterations"]) == "7"
    assert repr(content["ppo"]["kl_horizon"]) == "10000.0"


# --- what is refused, and how it is said ---


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("sead", "seed"),
        ("gate.min_winrate", "gate.min_win_rate"),
        ("data.prompts.formt", "data.prompts.format"),
        ("sft.training.learningrate", "sft.training.learning_rate"),
        ("ppo.rollout.sampling.temprature", "ppo.rollout.sampling.temperature"),
        ("evaluation.sampling.max_new_token", "evaluation.sampling.max_new_tokens"),  # behind an optional section
        ("data.demonstrations.colums", "data.demonstrations.columns"),
    ],
)
def test_a_misspelt_key_is_told_its_nearest(path: str, nearest: str) -> None:
    assert complaint(with_value(path, 1)) == f"{path} is not a parameter; did you mean {nearest}?"


def test_a_key_like_no_other_is_told_all_valid_ones() -> None:
    message = complaint(with_value("gate.xyzzy", 1))
    assert message == "gate.xyzzy is not a parameter; valid here: min_win_rate, max_kl."


@pytest.mark.parametrize(
    ("path", "value", "said"),
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
        ("data.template", "jinja", "data.template is 'jinja': input should be 'plain' or 'chat'."),
        ("data.prompts", None, "data.prompts is None: "),
        ("data.prompts.columns", {"prompt": 3}, "data.prompts.columns.prompt is 3: "),
        ("model.lora", {"rank": 0}, "model.lora.rank is 0: "),
        ("model.lora", {"target_modules": []}, "model.lora.target_modules is []: "),
        ("sft", None, "sft is None: "),
        ("preset", 3, "preset is 3: "),
    ],
)
def test_a_value_out_of_range_is_named(path: str, value: object, said: str) -> None:
    assert complaint(with_value(path, value)).startswith(said)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("ppo.minibatch", 24, "ppo: minibatch is 24, which does not divide the rollout batch of 64"),
        ("ppo.patience", 2, "ppo: patience counts evaluations on the validation prompts; set eval_every above 0."),
        ("ppo.dual_clip", 1.0, "ppo: dual_clip is 1.0, but must be above 1."),
        ("ppo.clip_range_high", 0.1, "ppo: clip_range_high is below clip_range"),
        ("ppo.importance_clip", [5, 0.5], "ppo: importance_clip is [5.0, 0.5], with the lower bound above the upper"),
        ("ppo.rollout.sampling.min_new_tokens", 65, "ppo.rollout.sampling: min_new_tokens is 65, more than"),
        (
            "ppo",
            {"training": {"engine": "deepspeed", "zero_stage": 3}, "critic": {"trains": "head"}},
            "the parameters: zero_stage 3 shards the weights of each model, but critic.trains: head lets models share weights",
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
def test_contradictions_are_named(path: str, value: object, said: str) -> None:
    assert complaint(with_value(path, value)).startswith(said)


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
def test_the_edge_of_what_is_valid(path: str, value: object) -> None:
    Params.model_validate(with_value(path, value))


def test_patience_with_looks_is_valid() -> None:
    assert PpoConfig(eval_every=5, patience=2).patience == 2


def test_the_rollout_batch_counts_samples() -> None:
    rollout = RolloutConfig(num_prompts=3, samples_per_prompt=8)
    assert PpoConfig(rollout=rollout, minibatch=12).minibatch == 12
    with pytest.raises(ValidationError, match="rollout batch of 24"):
        PpoConfig(rollout=rollout, minibatch=16)


def test_every_mistake_is_named_at_once() -> None:
    content = with_value("gate.max_kl", -1) | {"sead": 1}
    del content["data"]["prompts"]
    message = complaint(content)
    assert message.split("; ")[0] == "data.prompts is missing"
    assert "gate.max_kl is -1: " in message
    assert message.endswith("did you mean seed?")


def test_a_stage_explains_mistakes_in_its_own_settings() -> None:
    with pytest.raises(ValidationError) as caught:
        ImportModelStageConfig.model_validate({"kind": "base_model", "sorce": "x"})
    assert (
        explain_validation_error(caught.value, ImportModelStageConfig)
        == "source is missing; sorce is not a parameter; did you mean source?"
    )


# --- what each stage is given ---

SECTIONS = {
    PrepareDataStageConfig: {"data", "num_evaluation_prompts", "seed"},
    SftStageConfig: {"model", "sft", "checkpoint", "seed"},
    RewardModelStageConfig: {"model", "reward_model", "sampling", "checkpoint", "seed"},
    JudgeStageConfig: {"judge", "seed"},
    PpoStageConfig: {"model", "ppo", "checkpoint", "seed"},
    EvaluationStageConfig: {"model", "evaluation", "sampling", "gate", "seed"},
}


@pytest.mark.parametrize(("stage", "sections"), SECTIONS.items(), ids=lambda part: getattr(part, "__name__", ""))
def test_a_stage_is_given_its_own_sections_alone(stage: type[BaseConfig], sections: set[str]) -> None:
    params = Params.model_validate(with_value("seed", 5))
    given = params.stage(stage)
    assert set(json.loads(given.canonical_json())) == sections
    for name in sections & set(Params.model_fields):
        assert getattr(given, name) == getattr(params, name)


@pytest.mark.parametrize("stage", [SftStageConfig, RewardModelStageConfig, JudgeStageConfig, PrepareDataStageConfig])
def test_a_change_of_ppo_leaves_the_stages_before_it_alone(stage: type[BaseConfig]) -> None:
    """Their digests, and with them KFP's cache and the checkpoints, must survive the tuning of PPO."""
    before, after = (Params.model_validate(with_value("ppo.kl_coef", value)).stage(stage) for value in (0.05, 0.5))
    assert before.canonical_json() == after.canonical_json()


def test_the_reward_model_is_calibrated_on_what_ppo_samples() -> None:
    params = Params.model_validate(with_value("ppo.rollout.sampling.temperature", 0.7))
    assert params.stage(RewardModelStageConfig).sampling.temperature == 0.7


def test_evaluation_samples_as_ppo_does_unless_told_otherwise() -> None:
    content = with_value("ppo.rollout.sampling.temperature", 0.7)
    assert Params.model_validate(content).stage(EvaluationStageConfig).sampling.temperature == 0.7
    content["evaluation"] = {"sampling": {"temperature": 0.1}}
    assert Params.model_validate(content).stage(EvaluationStageConfig).sampling.temperature == 0.1
    assert Params.model_validate(content).stage(RewardModelStageConfig).sampling.temperature == 0.7


def test_prepare_data_is_told_how_many_prompts_evaluation_needs() -> None:
    params = Params.model_validate(with_value("evaluation.num_prompts", 17))
    assert params.stage(PrepareDataStageConfig).num_evaluation_prompts == 17


def test_the_actor_learns_more_slowly_than_other_models_by_default() -> None:
    assert PpoConfig().training.learning_rate == 1e-6
    assert TrainingConfig().learning_rate == 1e-5
