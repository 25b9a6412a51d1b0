"""The engine and the processes of evaluation and calibration."""

from typing import Any

import pytest
from pydantic import ValidationError

from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.model import ModelConfig, SamplingConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.config.sft import SftStageConfig

DATA = {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "preferences", "prompts")}


def params_of(**sections: Any) -> Params:
    return Params.model_validate({"data": DATA} | sections)


def error_message(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        params_of(**sections)
    return explain_validation_error(caught.value, Params)


VLLM = {"engine": "vllm", "vllm": {"gpu_memory_utilization": 0.3, "tensor_parallel_size": 2}}
TWO = {"num_processes": 2}


def test_evaluation_and_calibration_sample_with_the_engine_of_ppo() -> None:
    params = params_of(ppo={"rollout": VLLM, "training": TWO}, reward_model={"training": TWO}, evaluation=TWO)
    expected = EngineConfig.model_validate(VLLM)
    assert params.stage(EvaluationStageConfig).rollout == params.stage(RewardModelStageConfig).rollout == expected
    own = params_of(ppo={"rollout": {"engine": "vllm"}}, evaluation={"rollout": {"engine": "hf"}})
    assert own.stage(EvaluationStageConfig).rollout == EngineConfig()
    assert own.stage(RewardModelStageConfig).rollout == EngineConfig(engine="vllm")


def test_engine_of_ppo_does_not_affect_a_reward_model_without_calibration() -> None:
    """Its digest must not change while PPO is tuned; and vLLM's processes need not divide its own."""
    params = params_of(
        ppo={"rollout": VLLM, "training": TWO}, reward_model={"num_calibration_samples": 0}, evaluation=TWO
    )
    assert params.stage(RewardModelStageConfig).rollout == EngineConfig()
    assert not params.calibrates_with_vllm


def test_every_stage_that_trains_or_evaluates_says_how_many_processes_it_has() -> None:
    stages = {"sft": SftStageConfig, "reward_model": RewardModelStageConfig, "ppo": PpoStageConfig}
    params = params_of(
        **{name: {"training": {"num_processes": n}} for n, name in enumerate(stages, start=2)}
        | {"evaluation": TWO}
        | {"ppo": {"training": {"num_processes": 4}}}
    )
    assert [params.stage(stage).processes.number for stage in stages.values()] == [2, 3, 4]
    assert params.stage(EvaluationStageConfig).processes.number == 2


def test_an_imported_reward_model_is_measured_in_the_processes_of_training() -> None:
    params = params_of(reward_model={"use": "org/rm", "training": TWO | {"engine": "deepspeed", "zero_stage": 3}})
    config = params.stage(RewardModelStageConfig)
    assert (config.processes.number, config.reward_model.training.zero_stage) == (2, 3)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"evaluation": {"num_prompts": 3, "num_processes": 4}},
            "evaluation: num_prompts x num_samples is 3, fewer responses than processes (num_processes, 4); raise num_prompts.",
        ),
        (
            {"evaluation": {"shard_weights": True}},
            "the parameters: evaluation.shard_weights is true, but ppo.rollout.engine is hf, which samples from a whole model in each "
            "process; set evaluation.rollout to {engine: vllm}, or shard_weights to false.",
        ),
        (
            {
                "evaluation": {"shard_weights": True, "rollout": {"engine": "hf"}},
                "ppo": {"rollout": {"engine": "vllm"}},
            },
            "the parameters: evaluation.shard_weights is true, but evaluation.rollout.engine is hf, ",
        ),
        (
            {"evaluation": {"rollout": {"engine": "vllm"}, "sampling": {"temperature": 0.001}}},
            "the parameters: evaluation.sampling.temperature is 0.001, but vLLM supports 0.01 to 2; choose a value in this range.",
        ),
        (
            {"evaluation": {"rollout": {"engine": "vllm"}}, "ppo": {"rollout": {"sampling": {"temperature": 2.5}}}},
            "the parameters: ppo.rollout.sampling.temperature is 2.5, but vLLM supports 0.01 to 2; ",
        ),
        (
            {"evaluation": {"rollout": VLLM}},
            "the parameters: evaluation.rollout.vllm.tensor_parallel_size is 2, which does not divide evaluation.num_processes, 1; "
            "choose a divisor.",
        ),
        (
            {"ppo": {"rollout": VLLM, "training": TWO}, "reward_model": {"training": TWO}},
            "the parameters: ppo.rollout.vllm.tensor_parallel_size is 2, which does not divide evaluation.num_processes, 1; ",
        ),
        (
            {"ppo": {"rollout": VLLM, "training": TWO}, "evaluation": TWO},
            "the parameters: ppo.rollout.vllm.tensor_parallel_size is 2, which does not divide reward_model.training.num_processes, 1; ",
        ),
        ({"evaluation": {"rollout": {"engin": "hf"}}}, "evaluation.rollout.engin is not a parameter; did you mean"),
        ({"evaluation": {"num_processes": 0}}, "evaluation.num_processes is 0: "),
    ],
)
def test_what_cannot_run_is_refused(sections: dict[str, Any], message: str) -> None:
    assert error_message(**sections).startswith(message)


def test_settings_of_the_stage_are_checked_without_a_params_file() -> None:
    sections: dict[str, Any] = {"model": ModelConfig(), "gate": GateConfig(), "seed": 0}
    sharded = EvaluationConfig(shard_weights=True)
    with pytest.raises(ValidationError, match="shard_weights is true, but rollout.engine is hf"):
        EvaluationStageConfig(evaluation=sharded, sampling=SamplingConfig(), **sections)
    vllm = EngineConfig(engine="vllm")
    with pytest.raises(ValidationError, match="sampling.temperature is 3.0, but vLLM"):
        EvaluationStageConfig(evaluation=sharded, sampling=SamplingConfig(temperature=3), rollout=vllm, **sections)
    EvaluationStageConfig(evaluation=sharded, sampling=SamplingConfig(), rollout=vllm, **sections)
