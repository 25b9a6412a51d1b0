"""PPO without a critic and without a reward model: what is not planned, and what ReMax adds. Sizes are written out by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.config.model import LoraConfig, ModelConfig, TrainingConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import GROUP_ESTIMATORS, AdvantageEstimator, PpoStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.planner.copies import NO_COPY, Numeric
from components.rlhf.planner.durations import Seconds, seconds_of_run
from components.rlhf.planner.jobs import Job
from components.rlhf.planner.other_stages import plan_evaluation
from components.rlhf.planner.phases import GIB, StagePlan
from components.rlhf.planner.plan import Shapes, plan_run, reward_model_section, stages_of
from components.rlhf.planner.ppo_models import ppo_copies
from components.rlhf.planner.ppo_stage import plan_ppo
from components.rlhf.planner.sources import shape_of_folder
from pipelines.plan import Options, make_plan, read_shapes
from pipelines.settings import load_params
from tests.rlhf.planner.test_memory import evaluation

ROOT = Path(__file__).resolve().parents[3]
LLAMA = shape_of_folder(ROOT / "docs" / "shapes" / "llama-3.1-8b.json")
QWEN = shape_of_folder(ROOT / "docs" / "shapes" / "qwen2.5-0.5b.json")  # another vocabulary
P, SCALAR = 8_030_261_248, 8_030_261_248 - 128_256 * 4096 + 4096  # with a head of one output in place of the vocabulary
GPU, CPU = Numeric(bf16=True, on_gpu=True), Numeric(bf16=False, on_gpu=False)
ZERO_2: dict[str, Any] = {"engine": "deepspeed", "zero_stage": 2, "num_processes": 8}
ESTIMATORS = get_args(AdvantageEstimator)
CRITIC_FREE = [name for name in ESTIMATORS if name != "gae"]
NO_REWARD_MODEL = "ppo.rewards={kind: length, buffer: 4}"


def job(numeric: Numeric = GPU, **more: Any) -> Job:
    known: dict[str, Any] = {"reward_shape": LLAMA, "prompt_tokens": 1024, "text_tokens": 2048, "gpu_memory": 79 * GIB}
    return Job(shape=LLAMA, numeric=numeric, **(known | more))


def ppo(
    advantage: str = "gae", model: ModelConfig | None = None, training: dict[str, Any] = ZERO_2, **more: Any
) -> PpoStageConfig:
    rollout = {"engine": "vllm", "num_prompts": 128, "samples_per_prompt": 8}
    section = {"advantage": advantage, "minibatch": 128, "rollout": rollout, "training": TrainingConfig(**training)}
    return PpoStageConfig(
        model=model or ModelConfig(),
        ppo=section | more,
        checkpoint=CheckpointConfig(),
        seed=0,  # type: ignore[arg-type]
    )


def phases(plan: StagePlan) -> dict[str, dict[str, int]]:
    return {phase.name: dict(phase.device) for phase in plan.phases}


@pytest.mark.parametrize("advantage", CRITIC_FREE)
def test_estimators_without_a_critic_hold_none(advantage: str) -> None:
    found, with_critic = (plan_ppo(ppo(name), job()) for name in (advantage, "gae"))
    for name in ("generate", "score", "update"):
        mine, other = phases(found)[name], phases(with_critic)[name]
        assert mine["weights"] == 2 * P
        assert other["weights"] == 2 * P + 2 * SCALAR
        # fp32 masters and two moments, a share of 8 of the trained weights
        assert mine["optimizer"] == pytest.approx(12 * P / 8, abs=8)
        assert other["optimizer"] == pytest.approx(12 * (P + SCALAR) / 8, abs=16)
        assert mine["reward model"] == other["reward model"] == 2 * SCALAR
    (mine_saved, other_saved) = (
        next(phase.main["checkpoint"] for phase in plan.phases if phase.name == "checkpoint")
        for plan in (found, with_critic)
    )
    assert mine_saved == pytest.approx(12 * P / 8, abs=8)
    assert other_saved == pytest.approx(12 * (P + SCALAR) / 8, abs=16)


def test_critic_without_a_reward_model_starts_from_the_fine_tuned_model() -> None:
    without = job(reward_shape=None)
    found = ppo_copies(ppo(), without)
    assert (found.reward_model, found.critic_base, found.critic.weights) == (0, 0, 2 * SCALAR)
    head = ppo_copies(ppo(critic={"trains": "head"}), without)
    assert (head.reward_model, head.critic_base) == (
        0,
        2 * SCALAR,
    )  # frozen below the head, where no reward model holds it
    assert head.critic.optimizer == 12 * 4096 / 8
    assert ppo_copies(ppo(critic={"trains": "head"}), job()).critic_base == 0
    adapters = ppo(model=ModelConfig(lora=LoraConfig(rank=16)))
    own, shared = ppo_copies(adapters, without), ppo_copies(adapters, job())
    assert (own.critic_base, shared.critic_base, shared.reward_model) == (2 * SCALAR, 0, 2 * SCALAR)
    assert own.critic.weights == shared.critic.weights < GIB
    neither = ppo_copies(ppo("rloo", model=ModelConfig(lora=LoraConfig(rank=16))), without)
    assert (neither.critic, neither.critic_base, neither.reward_model, neither.reference) == (NO_COPY, 0, 0, 0)


def test_frozen_layers_are_the_actors_whichever_model_the_critic_starts_from() -> None:
    model = ModelConfig(num_frozen_layers=24)
    trained = LLAMA.trained(24, scalar=True)
    for reward_shape in (LLAMA, None):
        copies = ppo_copies(ppo(model=model), job(reward_shape=reward_shape))
        assert copies.critic.weights == 2 * trained
        head = ppo_copies(ppo(model=model, critic={"trains": "head"}), job(reward_shape=reward_shape))
        assert head.reward_model + head.critic_base == 2 * trained


def test_critic_reads_the_ids_of_the_actor() -> None:
    """A reward model with another vocabulary scores texts, and the critic starts from the fine-tuned model."""
    copies = ppo_copies(ppo(), job(reward_shape=QWEN))
    assert copies.critic.weights == 2 * SCALAR
    assert copies.reward_model == 2 * (QWEN.total - QWEN.head + QWEN.hidden)
    same = replace(QWEN, vocab=LLAMA.vocab)
    assert ppo_copies(ppo(), job(reward_shape=same)).critic.weights == copies.reward_model


def test_quantized_base_that_comes_second_is_whole_while_it_is_loaded() -> None:
    model, torch = ModelConfig(lora=LoraConfig(rank=16, quantization="nf4")), {"num_processes": 1}
    whole = 4 * P
    for advantage, reward_shape in (("gae", None), ("rloo", LLAMA), ("rloo", None)):
        plan = plan_ppo(ppo(advantage, model=model, training=torch), job(CPU, reward_shape=reward_shape))
        found = phases(plan)["load"]
        if (advantage, reward_shape) == ("rloo", None):  # the actor alone
            assert found["weights"] == whole
        else:
            # The second model is whole beside the actor, which is in 4 bits by then.
            held = found["reward model"] + found["critic's base"]
            assert found["weights before they are quantized"] + held == whole
            assert found["weights"] < whole / 3


def test_evaluation_scores_only_with_a_reward_model() -> None:
    config = evaluation()
    assert "score" in phases(plan_evaluation(config, job()))
    assert list(phases(plan_evaluation(config, job(reward_shape=None)))) == ["generate", "load", "KL"]


TRAININGS = st.fixed_dictionaries(
    {
        "engine": st.sampled_from(["torch", "deepspeed"]),
        "zero_stage": st.sampled_from([1, 2]),
        "num_processes": st.sampled_from([1, 2, 4, 8]),
        "gradient_checkpointing": st.booleans(),
        "microbatch_tokens": st.integers(1, 100_000),
    }
)


@settings(max_examples=60, deadline=None)
@given(TRAININGS, st.sampled_from(CRITIC_FREE), st.sampled_from([LLAMA, None]), st.sampled_from([0, 24]), st.booleans())
def test_less_is_never_more(
    training: dict[str, Any], advantage: str, reward_shape: Any, frozen: int, has_lora: bool
) -> None:
    """Without a critic, and without a reward model, no phase holds more."""
    model = ModelConfig(num_frozen_layers=0 if has_lora else frozen, lora=LoraConfig() if has_lora else None)
    for numeric in (GPU, CPU):
        whole = plan_ppo(ppo("gae", model, training), job(numeric))
        less = plan_ppo(ppo(advantage, model, training), job(numeric, reward_shape=reward_shape))
        other = {phase.name: whole.main_of(phase) + sum(phase.device.values()) for phase in whole.phases}
        for phase in less.phases:
            assert all(type(size) is int and size >= 0 for size in [*phase.device.values(), *phase.main.values()])
            assert less.main_of(phase) + sum(phase.device.values()) <= other[phase.name]


def test_entropy_bonus_and_demonstrations_need_more_for_their_pass() -> None:
    plain, entropy, ptx = (
        phases(plan_ppo(ppo("rloo", **more), job()))["update"]
        for more in ({}, {"entropy_coef": 0.01}, {"ptx_coef": 0.1})
    )
    # A pass of 4,096 tokens has 240 of responses (64 of 1,088), whose logits have two more tensors in fp32.
    assert entropy["logits"] - plain["logits"] == 240 * 128_256 * 8
    assert ptx["activations"] >= plain["activations"]
    short = job(text_tokens=16)
    assert phases(plan_ppo(ppo("rloo", ptx_coef=0.1), short)) == phases(plan_ppo(ppo("rloo"), short))


def params(*overrides: str) -> Params:
    shape = ROOT / "docs" / "shapes" / "llama-3.1-8b.json"
    return load_params(ROOT / "pipelines" / "params" / "llama3_8b_8gpu.yaml", [*overrides, f"model.source={shape}"])


GROUPS = ("ppo.critic={}", "ppo.rollout.num_prompts=128", "ppo.rollout.samples_per_prompt=8", "ppo.minibatch=128")


def seconds(*overrides: str) -> Seconds:
    found = params(*GROUPS, *overrides)
    return seconds_of_run(found, read_shapes(found), {"demonstrations": 1000, "preferences": 1000})["ppo"]


def parts_without(found: Seconds, names: Sequence[str]) -> dict[str, float]:
    return {name: size for name, size in found.parts.items() if name not in names}


def test_times_without_a_critic() -> None:
    whole, free = seconds(), seconds("ppo.advantage=group_norm")
    # Of 3 models with the vocabulary's head or one of a single output, and of 4, which compute the rollout.
    scored = (2 * LLAMA.active + LLAMA.active) / (2 * LLAMA.active + 2 * LLAMA.active)
    assert free.parts["score"] == pytest.approx(scored * whole.parts["score"])
    assert free.parts["update"] == pytest.approx(whole.parts["update"] / 2)
    assert parts_without(free, ["score", "update", "validation"]) == parts_without(
        whole, ["score", "update", "validation"]
    )
    alone = seconds("ppo.advantage=group_norm", NO_REWARD_MODEL)
    assert alone.parts["score"] == pytest.approx(whole.parts["score"] / 2)


def test_remax_samples_and_scores_a_greedy_response_to_each_prompt() -> None:
    rounds = ("ppo.rollout.sampling.batch_size=16",)  # 1,024 and 128 responses in 8 processes are 8 and 1 batches of 16
    plain, remax = seconds("ppo.advantage=reinforce++", *rounds), seconds("ppo.advantage=remax", *rounds)
    assert remax.parts["generate"] == pytest.approx(plain.parts["generate"] * 9 / 8)
    # One of three models computes 128 more responses beside 1,024.
    assert remax.parts["score"] == pytest.approx(plain.parts["score"] * (1 + 1 / 8 / 3))
    assert remax.parts["update"] == plain.parts["update"]
    no_model = seconds("ppo.advantage=remax", NO_REWARD_MODEL, *rounds)
    assert no_model.parts["score"] == pytest.approx(plain.parts["score"] * 2 / 3)


def test_actor_that_waits_for_its_critic_takes_less_time() -> None:
    whole, waits = seconds("ppo.num_iterations=10"), seconds("ppo.num_iterations=10", "ppo.critic.warmup_iterations=4")
    assert waits.parts["update"] == pytest.approx(whole.parts["update"] * (0.5 + 0.5 * 0.6))


def test_times_of_programs_and_servers_are_said_to_be_unknown() -> None:
    server = "ppo.rewards=[{kind: http, url: 'http://rewards:5000'}, {kind: repetition}, {kind: reward_model}]"
    assert seconds(server).note == "without the time of the rewards http, which is not known"
    assert seconds().note == ""


@pytest.mark.parametrize(
    ("overrides", "has_stage"), [((), True), ((NO_REWARD_MODEL,), False), (("sft.use=somewhere",), True)]
)
def test_stages_are_those_of_the_run(overrides: tuple[str, ...], has_stage: bool) -> None:
    found = params(*overrides)
    assert ("reward_model" in stages_of(found)) is has_stage
    assert ("sft" in stages_of(found)) is (found.sft.use is None)
    assert (read_shapes(found).reward_model is not None) is has_stage


def test_run_without_a_reward_model_is_planned_priced_and_saved_without_it() -> None:
    options = Options(records={"demonstrations": 1000, "preferences": 1000})
    prices = ("cluster.profiles.gpu-8x80gb={price_per_hour: 20}",)
    whole = make_plan(params(*GROUPS, *prices), options)
    less = make_plan(params(*GROUPS, *prices, "ppo.advantage=dr_grpo", NO_REWARD_MODEL), options)
    assert set(whole.stages) - set(less.stages) == {"reward_model"}
    assert [saves.stage for saves in less.saves] == ["sft", "ppo"]
    (before,), (after,) = ([saves.total_bytes for saves in p.saves if saves.stage == "ppo"] for p in (whole, less))
    assert before == pytest.approx(12 * (P + SCALAR), abs=200)
    assert after == pytest.approx(12 * P, abs=100)
    price, other = whole.price("ppo"), less.price("ppo")
    assert price is not None and other is not None and other < 0.7 * price
    assert less.verdicts["ppo"].share < whole.verdicts["ppo"].share


def test_reward_model_of_a_judge_alone_is_planned_as_such() -> None:
    judged = params(NO_REWARD_MODEL, "judge={kind: reward_model}")
    assert "reward_model" in stages_of(judged)
    section = reward_model_section(judged)
    assert (section.use, section.num_calibration_samples) == (None, 0)
    plan = plan_run(judged, read_shapes(judged))["reward_model"]
    assert "generate" not in [phase.name for phase in plan.phases]  # nothing is calibrated
    imported = judged.model_copy(update={"judge": judged.judge.model_copy(update={"use": "elsewhere"})})  # type: ignore[union-attr]
    shapes = Shapes(base=LLAMA, reward_model=None, judge=QWEN)
    scored = next(phase for phase in plan_run(imported, shapes)["reward_model"].phases if phase.name == "score")
    processes = imported.reward_model.training.num_processes
    sharded = 2 * (QWEN.total - QWEN.head + QWEN.hidden) / processes
    assert scored.device["weights"] == pytest.approx(sharded, abs=processes)


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_every_estimator_is_planned_with_and_without_a_reward_model(advantage: str) -> None:
    group = () if advantage in GROUP_ESTIMATORS else ("ppo.rollout.samples_per_prompt=1",)
    for rewards in ((), (NO_REWARD_MODEL,)):
        plan = make_plan(params(*GROUPS, *group, f"ppo.advantage={advantage}", *rewards), Options())
        assert plan.verdicts["ppo"].text in ("fits", "tight")
        assert plan.seconds["ppo"].total > 0
