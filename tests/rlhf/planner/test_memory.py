"""The arithmetic, against numbers that are written out here, and against what must hold for any settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.config.dpo import DpoConfig, DpoStageConfig
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.model import LoraConfig, ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.ppo import CriticConfig, PpoConfig, PpoStageConfig
from components.rlhf.config.reward_model import RewardModelConfig, RewardModelStageConfig
from components.rlhf.config.rollout import EngineConfig, RolloutConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.planner.copies import Numeric, trained_copy
from components.rlhf.planner.jobs import Job
from components.rlhf.planner.other_stages import plan_evaluation
from components.rlhf.planner.phases import GIB, StagePlan
from components.rlhf.planner.ppo_models import ppo_copies
from components.rlhf.planner.ppo_stage import plan_ppo
from components.rlhf.planner.sources import shape_of_folder
from components.rlhf.planner.training_stages import base_bytes, plan_dpo, plan_reward_model, plan_sft

SHAPES = Path(__file__).resolve().parents[3] / "docs" / "shapes"
LLAMA = shape_of_folder(SHAPES / "llama-3.1-8b.json")
P = 8_030_261_248
GPU, CPU = Numeric(bf16=True, on_gpu=True), Numeric(bf16=False, on_gpu=False)


def job(numeric: Numeric = GPU, **more: Any) -> Job:
    known = {"prompt_tokens": 1024, "text_tokens": 2048, "gpu_memory": 79 * GIB}
    return Job(shape=LLAMA, reward_shape=LLAMA, numeric=numeric, **(known | more))


def sft(model: ModelConfig | None = None, **training: Any) -> SftStageConfig:
    return SftStageConfig(
        model=model or ModelConfig(),
        sft=SftConfig(batch_size=128, training=TrainingConfig(**training)),
        checkpoint=CheckpointConfig(),
        seed=0,
    )


def ppo(
    model: ModelConfig | None = None, critic: str = "layers", rollout: str = "vllm", **training: Any
) -> PpoStageConfig:
    return PpoStageConfig(
        model=model or ModelConfig(),
        ppo=PpoConfig(
            minibatch=128,
            rollout=RolloutConfig(engine=rollout, num_prompts=1024),  # type: ignore[arg-type]
            critic=CriticConfig(trains=critic),  # type: ignore[arg-type]
            training=TrainingConfig(**training),
        ),
        checkpoint=CheckpointConfig(),
        seed=0,
    )


def dpo(model: ModelConfig | None = None, training: dict[str, Any] | None = None, **section: Any) -> DpoStageConfig:
    known: dict[str, Any] = {"batch_size": 128, "training": TrainingConfig(**(training or {}))}
    return DpoStageConfig(
        model=model or ModelConfig(), dpo=DpoConfig(**(known | section)), checkpoint=CheckpointConfig(), seed=0
    )


def parts(plan: StagePlan, name: str) -> dict[str, int]:
    return plan.parts(name)


def test_llama_8b_under_zero_3_on_8_gpus() -> None:
    """2 bytes a weight, 12 of fp32 masters and moments and 4 of fp32 gradients, over 8 processes."""
    copy = trained_copy(P, 0, LLAMA.largest, TrainingConfig(engine="deepspeed", zero_stage=3, num_processes=8), GPU)
    share = P / 8
    assert copy.weights == pytest.approx(2 * share, abs=8)
    assert copy.optimizer == pytest.approx(12 * share, abs=8)
    assert copy.gradients == pytest.approx(4 * share, abs=8)
    assert copy.snapshot == pytest.approx(12 * share, abs=8)
    # Two buckets of 500 million bf16 gradients, and a billion gathered weights with the largest (128,256 x 4,096) once more.
    assert copy.buffers == 1_000_000_000
    assert copy.working == 2 * 1_000_000_000 + 1_000_000_000 + 2 * 128_256 * 4096


def test_torch_in_fp32_and_bf16() -> None:
    """4 bytes of weights, 8 of moments and 4 of gradients in every process; bf16 adds the copies that autocast keeps."""
    for numeric, cast in ((Numeric(bf16=False, on_gpu=True), 0), (GPU, 2)):
        copy = trained_copy(1000, 200, 100, TrainingConfig(num_processes=1), numeric)
        assert (copy.weights, copy.optimizer, copy.gradients) == (4000 + 200 * numeric.width, 8000, 4000)
        assert (copy.cast, copy.step, copy.working) == (cast * 1000, 0, 0)


def test_frozen_layers_have_no_gradients_and_no_moments() -> None:
    # Of 32 layers 24 are frozen, with the embeddings: 8 layers, the final norm and the head are trained.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    trained = 8 * layer + 4096 + 128_256 * 4096
    assert LLAMA.trained(24) == trained
    assert LLAMA.frozen(24) == P - trained
    found = parts(plan_sft(sft(ModelConfig(num_frozen_layers=24)), job()), "update")
    assert found["gradients"] == 4 * trained
    assert found["optimizer"] == 8 * trained
    assert found["weights"] == 4 * trained + 2 * (P - trained)


def test_adapters_are_all_that_lora_trains() -> None:
    # Rank 16 on the 7 matrices of a layer: q, k, v, o, gate, up and down.
    sums = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    adapters = 32 * 16 * sums
    found = parts(plan_sft(sft(ModelConfig(lora=LoraConfig(rank=16))), job()), "update")
    assert found["gradients"] == 4 * adapters
    assert found["weights"] == 4 * adapters + 2 * P


def test_models_of_ppo_share_what_the_stage_shares() -> None:
    training = {"engine": "deepspeed", "zero_stage": 2, "num_processes": 8}
    whole = ppo_copies(ppo(**training), job())
    assert (whole.reference, whole.reward_model, whole.rollout) == (2 * P, 2 * (P - LLAMA.head + 4096), 0)
    lora = ppo_copies(ppo(ModelConfig(lora=LoraConfig()), **training), job())
    assert (lora.reference, lora.critic.weights < 2**30) == (
        0,
        True,
    )  # the critic's layers are those of the reward model
    head = ppo_copies(ppo(critic="head", **training), job())
    assert head.critic.optimizer == 12 * 4096 / 8
    frozen = ppo_copies(ppo(ModelConfig(num_frozen_layers=24), **training), job())
    assert frozen.reference == 2 * LLAMA.trained(24)


def test_vllm_takes_its_share_of_the_gpu_while_it_samples_and_sleeps_in_main_memory() -> None:
    plan = plan_ppo(ppo(engine="deepspeed", zero_stage=3, num_processes=8), job())
    assert parts(plan, "generate")["vLLM"] == int(0.4 * 79 * GIB)
    (update,) = [phase for phase in plan.phases if phase.name == "update"]
    assert update.main["vLLM, asleep"] == 2 * P


def test_offloaded_optimizer_is_in_main_memory() -> None:
    training = {"engine": "deepspeed", "zero_stage": 2, "num_processes": 8}
    gpu, main = (plan_sft(sft(**training, offload_optimizer=off), job()) for off in (False, True))
    assert parts(gpu, "update")["optimizer"] == pytest.approx(12 * P / 8, abs=8)
    assert "optimizer" not in parts(main, "update")
    (update,) = [phase for phase in main.phases if phase.name == "update"]
    assert update.main["optimizer"] == pytest.approx(12 * P / 8, abs=8)


def test_without_a_gpu_everything_is_in_main_memory() -> None:
    plan = plan_sft(sft(), job(CPU))
    assert plan.device_peak() == ("", 0)
    assert plan.main_peak()[1] > 16 * P
    assert plan.pod_memory() > plan.main_peak()[1]


TRAININGS = st.fixed_dictionaries(
    {
        "engine": st.sampled_from(["torch", "deepspeed"]),
        "zero_stage": st.sampled_from([1, 2, 3]),
        "num_processes": st.sampled_from([1, 2, 4, 8, 16]),
        "gradient_checkpointing": st.booleans(),
        "microbatch_tokens": st.integers(1, 100_000),
    }
)
ANY = settings(max_examples=60, deadline=None)


def update_bytes(plan: StagePlan) -> int:
    return sum(plan.parts("update").values())


@ANY
@given(TRAININGS, st.sampled_from([GPU, CPU, Numeric(bf16=True, on_gpu=False)]))
def test_more_processes_never_need_more_each(training: dict[str, Any], numeric: Numeric) -> None:
    sizes = []
    for processes in (2, 4, 8, 64):
        plan = plan_sft(sft(**(training | {"num_processes": processes})), job(numeric))
        sizes.append(update_bytes(plan))
    assert sizes == sorted(sizes, reverse=True)


@ANY
@given(TRAININGS, st.integers(1, 50_000))
def test_longer_passes_never_need_less(training: dict[str, Any], more: int) -> None:
    longer = training | {"microbatch_tokens": training["microbatch_tokens"] + more}
    assert update_bytes(plan_sft(sft(**longer), job())) >= update_bytes(plan_sft(sft(**training), job()))


@ANY
@given(TRAININGS)
def test_checkpointed_activations_never_need_more(training: dict[str, Any]) -> None:
    off, on = (training | {"gradient_checkpointing": value} for value in (False, True))
    assert update_bytes(plan_sft(sft(**on), job())) <= update_bytes(plan_sft(sft(**off), job()))


@ANY
@given(TRAININGS, st.integers(0, 31))
def test_more_frozen_layers_never_need_more(training: dict[str, Any], frozen: int) -> None:
    training = training | {"zero_stage": min(training["zero_stage"], 2)}
    fewer, more = (plan_sft(sft(ModelConfig(num_frozen_layers=n), **training), job()) for n in (frozen, frozen + 1))
    assert update_bytes(more) <= update_bytes(fewer)


@ANY
@given(TRAININGS, st.sampled_from(["hf", "vllm"]), st.sampled_from(["layers", "head"]), st.booleans())
def test_every_part_of_every_phase_is_a_size(
    training: dict[str, Any], rollout: str, critic: str, has_lora: bool
) -> None:
    training = training | {"zero_stage": min(training["zero_stage"], 2)}
    model = ModelConfig(lora=LoraConfig() if has_lora else None)
    for numeric in (GPU, CPU):
        plan = plan_ppo(ppo(model, critic, rollout, **training), job(numeric))
        for phase in plan.phases:
            assert all(type(size) is int and size >= 0 for size in [*phase.device.values(), *phase.main.values()])
        assert plan.main_peak()[1] > 0


def test_more_zero_needs_less_for_each_of_8_processes() -> None:
    sizes = []
    for zero in (1, 2, 3):
        training = TrainingConfig(engine="deepspeed", zero_stage=zero, num_processes=8)  # type: ignore[arg-type]
        copy = trained_copy(P, 0, LLAMA.largest, training, GPU)
        sizes.append(copy.weights + copy.optimizer + copy.gradients + copy.buffers)
    assert sizes == sorted(sizes, reverse=True)


def test_phases_that_did_not_happen_can_be_left_out() -> None:
    plan = plan_sft(sft(), job(CPU))
    assert plan.main_peak()[0] == "checkpoint"
    assert plan.main_peak(without=("checkpoint",))[1] == plan.main_peak()[1] - 12 * P
    assert plan_sft(sft(), replace(job(CPU), checkpoints=False)).main_peak()[1] == plan.main_peak()[1] - 12 * P


def test_quantized_base_is_4_bits_and_its_scales() -> None:
    """Half a byte a value, a byte for 64 of them, 4 bytes for 256 of these; the embeddings, the head and the norms stay in bf16."""
    plain, quantized = (ModelConfig(lora=LoraConfig(rank=16, quantization=kind)) for kind in (None, "nf4"))
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    size = 2 * (P - linear) + linear * (0.5 + 1 / 64 + 1 / 4096)
    assert base_bytes(LLAMA, quantized, job(), scalar=False) == pytest.approx(size, abs=2)
    # The updates of two earlier stages stay beside the 4 bits, in fp32.
    assert base_bytes(LLAMA, quantized, job(), scalar=False, earlier=2) == pytest.approx(size + 8 * adapters, abs=2)
    assert base_bytes(LLAMA, plain, job(), scalar=False, earlier=2) == 2 * P


def test_dpo_holds_one_model_which_computes_the_reference_before_it_is_trained() -> None:
    training = {"engine": "deepspeed", "zero_stage": 3, "num_processes": 8}
    plan = plan_dpo(dpo(training=training), job())
    assert [phase.name for phase in plan.phases] == ["load", "reference", "update", "step", "checkpoint", "export"]
    for name in ("reference", "update"):
        assert phase_of(plan, name)["weights"] == pytest.approx(2 * P / 8, abs=8)
    assert "gradients" not in phase_of(plan, "reference")
    without = plan_dpo(dpo(training=training, loss="simpo"), job())
    assert "reference" not in [phase.name for phase in without.phases]
    assert phase_of(without, "update") == phase_of(plan, "update")


def test_pair_of_dpo_is_in_one_pass_however_long_and_labeled_answers_are_not() -> None:
    """Two texts of 2,048 tokens, where a pass has 1,000: as sft with passes of 4,096, and for kto as sft with 2,048."""
    small = {"microbatch_tokens": 1000}
    for loss, tokens in (("dpo", 4096), ("kto", 2048)):
        found = phase_of(plan_dpo(dpo(training=small, loss=loss), job()), "update")
        assert found == phase_of(plan_sft(sft(microbatch_tokens=tokens), job()), "update")


@pytest.mark.parametrize(
    ("section", "size"),
    [
        ({"max_steps": 1}, 2 * 128 * 2048 * 4096 * 2),  # 128 pairs, each value in bf16: 4 GiB, of which 1 is the limit
        ({"max_steps": 1, "batch_size": 16}, 2 * 16 * 2048 * 4096 * 2),
        ({"max_steps": 1, "batch_size": 16, "loss": "kto"}, 16 * 2048 * 4096 * 2),
        ({"max_steps": 0}, 2**30),
    ],
)
def test_output_of_frozen_layers_is_kept_for_the_texts_of_dpo(section: dict[str, Any], size: int) -> None:
    plan = plan_dpo(dpo(ModelConfig(num_frozen_layers=24), **section), job())
    for name in ("reference", "update", "step"):
        assert phase_of(plan, name)["frozen layers' output"] == min(size, 2**30)
    assert "frozen layers' output" not in phase_of(plan_dpo(dpo(), job()), "update")


def reward_model(rollout: str = "hf", **section: Any) -> RewardModelStageConfig:
    return RewardModelStageConfig(
        model=ModelConfig(),
        reward_model=RewardModelConfig(batch_size=128, **section),
        sampling=SamplingConfig(),
        rollout=EngineConfig(engine=rollout),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(),
        seed=0,
    )


def phase_of(plan: StagePlan, name: str) -> dict[str, int]:
    (found,) = [phase for phase in plan.phases if phase.name == name]
    return dict(found.device)


def test_calibration_samples_before_the_reward_model_is_loaded() -> None:
    training = TrainingConfig(engine="deepspeed", zero_stage=3, num_processes=8)
    hf, vllm = (plan_reward_model(reward_model(engine, training=training), job()) for engine in ("hf", "vllm"))
    assert [plan.phases[0].name for plan in (hf, vllm)] == ["generate", "generate"]
    assert "optimizer" not in phase_of(hf, "generate")
    assert "weights" not in phase_of(hf, "generate")
    assert phase_of(hf, "generate")["sampled model"] == 2 * P
    assert phase_of(vllm, "generate")["vLLM"] == int(0.4 * 79 * GIB)
    without = plan_reward_model(reward_model("vllm", training=training, num_calibration_samples=0), job())
    assert "generate" not in [phase.name for phase in without.phases]


def test_imported_reward_model_is_sharded_as_a_trained_one() -> None:
    training = TrainingConfig(engine="deepspeed", zero_stage=3, num_processes=8)
    scored = phase_of(plan_reward_model(reward_model(use="somewhere", training=training), job()), "score")
    assert scored["weights"] == pytest.approx(2 * (P - LLAMA.head + 4096) / 8, abs=8)
    assert "optimizer" not in scored


def evaluation(rollout: str = "hf", **section: Any) -> EvaluationStageConfig:
    return EvaluationStageConfig(
        model=ModelConfig(),
        evaluation=EvaluationConfig(**section),
        sampling=SamplingConfig(),
        rollout=EngineConfig(engine=rollout),  # type: ignore[arg-type]
        gate=GateConfig(),
        seed=0,
    )


def test_evaluation_has_one_thing_in_memory_after_the_other() -> None:
    scalar = P - LLAMA.head + 4096
    plan = plan_evaluation(evaluation(), job(judge_shape=LLAMA))
    assert [phase.name for phase in plan.phases] == ["generate", "load", "KL", "score", "judge"]
    assert phase_of(plan, "generate")["sampled model"] == 2 * P
    assert (phase_of(plan, "KL")["both models"], "reward model" in phase_of(plan, "KL")) == (4 * P, False)
    for name in ("score", "judge"):
        assert phase_of(plan, name)["reward model"] == 2 * scalar
        assert "both models" not in phase_of(plan, name)
    assert "judge" not in [phase.name for phase in plan_evaluation(evaluation(), job()).phases]


def test_sharded_models_of_the_evaluation_are_whole_layer_by_layer() -> None:
    whole, sharded = (
        plan_evaluation(evaluation("vllm", num_processes=8, shard_weights=shard), job()) for shard in (False, True)
    )
    assert phase_of(whole, "KL")["both models"] == 4 * P
    found = phase_of(sharded, "KL")
    assert found["both models"] == pytest.approx(4 * P / 8, abs=8)
    # Of each model 50 million weights are fetched ahead, beside the largest of 128,256 x 4,096.
    assert found["working weights"] == 2 * 2 * (50_000_000 + 128_256 * 4096)
    assert phase_of(sharded, "generate")["vLLM"] == int(0.4 * 79 * GIB)
    assert sharded.num_processes == 8


def test_logits_of_the_kl_are_those_of_two_models_and_five_tensors_in_fp32() -> None:
    """On a CPU at most 2^24 logits at once: with a vocabulary of 128,256 those of 130 tokens."""
    found = phase_of(plan_evaluation(evaluation(), job(CPU)), "KL")["logits"]
    assert found == 130 * 128_256 * (2 * 4 + 5 * 4)
    sampling = SamplingConfig(min_new_tokens=4)
    masked = evaluation().model_copy(update={"sampling": sampling})
    assert phase_of(plan_evaluation(masked, job(CPU)), "KL")["logits"] == 130 * 128_256 * (2 * 2 * 4 + 5 * 4)


def test_frozen_layers_are_in_memory_once_for_the_kl() -> None:
    config = evaluation().model_copy(update={"model": ModelConfig(num_frozen_layers=24)})
    plan = plan_evaluation(config, job())
    assert phase_of(plan, "load")["both models"] == 4 * P
    assert phase_of(plan, "KL")["both models"] == 4 * P - 2 * LLAMA.frozen(24)
