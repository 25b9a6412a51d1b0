"""Every stage says what its processes have held, and what was planned."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components.evaluation.tables import stage_costs
from components.rlhf.artifacts.manifest import read_manifest, write_manifest
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig
from components.rlhf.config.ppo import PpoConfig, PpoStageConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.datasets import save_dataset
from components.rlhf.data.records import Demonstration, Prompt, Turn
from components.rlhf.planner.phases import GIB, Phase, StagePlan
from components.rlhf.runtime.measured import PLANNED_STAGES, StageMemory, main_peak, sentence
from components.rlhf.runtime.planned import READS, plan_here
from pipelines.local.summary import _memory
from tests.support.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "base_model", seed=0)
    write_manifest(folder / "base_model", kind="base_model")
    rows = [Demonstration(turns=(Turn(context="It is", answer=f" good {i}"),)) for i in range(8)]
    (folder / "demonstrations").mkdir()
    save_dataset(folder / "demonstrations", {"train": rows, "heldout": rows[:2]}, max_tokens=64, counts={})
    write_manifest(folder / "demonstrations", kind="demonstrations")
    return {name: folder / name for name in ("base_model", "demonstrations")}


def settings() -> SftStageConfig:
    return SftStageConfig(
        model=ModelConfig(precision="fp32"),
        sft=SftConfig(max_steps=1, batch_size=4),
        checkpoint=CheckpointConfig(),
        seed=0,
    )


def run_sft(inputs: dict[str, Path], folder: Path) -> str:
    """The output of the stage program in a process of its own, whose memory is that of nothing else."""
    command = [sys.executable, "-m", "components.sft", "--settings", settings().canonical_json()]
    command += ["--tracking", '{"enabled": false}']
    command += [f"--base-model={inputs['base_model']}", f"--demonstrations={inputs['demonstrations']}"]
    command += [f"--{name}={folder / name}" for name in ("model", "metrics", "summary")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_stage_compares_its_memory_with_its_plan(inputs: dict[str, Path], tmp_path: Path) -> None:
    output = run_sft(inputs, tmp_path / "stages" / "sft")
    manifest = read_manifest(tmp_path / "stages" / "sft" / "model")
    planned, peak = manifest.measurements["memory/planned_gib"], manifest.measurements["memory/peak_gib"]
    # The libraries are nearly all of it: the model has 30,000 parameters.
    assert planned == pytest.approx(peak, rel=0.15)
    assert f"[sft] memory: {peak:.2f} GiB at most in a process, planned {planned:.2f}" in output
    assert manifest.metadata()["memory/peak_gib"] == peak
    assert stage_costs({"sft_model": manifest}, {}, "ppo")[0].peak_gib == peak
    assert _memory(tmp_path, "sft") == {"planned_gib": planned, "peak_gib": peak}


def test_digest_of_an_artifact_does_not_depend_on_the_memory_of_its_stage(inputs: dict[str, Path]) -> None:
    folder = inputs["base_model"]
    before = read_manifest(folder)
    write_manifest(folder, kind="base_model", measurements={"memory/peak_gib": 7.0})
    after = read_manifest(folder)
    assert after.measurements == {"memory/peak_gib": 7.0}
    assert after.digest == before.digest


def test_manifest_of_an_earlier_version_has_no_measurements(inputs: dict[str, Path]) -> None:
    path = inputs["demonstrations"] / "manifest.json"
    content = json.loads(path.read_text())
    del content["measurements"]
    path.write_text(json.dumps(content))
    assert read_manifest(inputs["demonstrations"]).measurements == {}


def test_every_stage_that_has_a_plan_is_known_before_the_planner_is_loaded() -> None:
    assert set(PLANNED_STAGES) == set(READS)


def test_plan_is_made_from_the_folders_of_the_stage(inputs: dict[str, Path]) -> None:
    plan = plan_here("sft", settings(), inputs, checkpoints=False)
    assert {phase.name for phase in plan.phases} == {"load", "update", "step", "export"}


def test_plan_of_an_evaluation_has_the_judge_of_its_folder(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    prompts = [Prompt(prompt="It is", id=str(number)) for number in range(4)]
    save_dataset(tmp_path / "prompts", {"train": prompts, "heldout": prompts}, max_tokens=64, counts={})
    model, judge = inputs["base_model"], tmp_path / "judge"
    make_tiny_model(judge / "reward_model", seed=1)
    config = EvaluationStageConfig(
        model=ModelConfig(), evaluation=EvaluationConfig(), sampling=SamplingConfig(), gate=GateConfig(), seed=0
    )
    paths = {
        "sft_model": model,
        "policy": model,
        "reward_model": model,
        "judge": judge,
        "prompts": tmp_path / "prompts",
    }
    plan = plan_here("evaluation", config, paths, checkpoints=False)
    assert [phase.name for phase in plan.phases] == ["generate", "load", "KL", "score", "judge"]
    shutil.rmtree(judge / "reward_model")
    plan = plan_here("evaluation", config, paths, checkpoints=False)
    assert "judge" not in [phase.name for phase in plan.phases]
    plan = plan_here("evaluation", config, paths | {"reward_model": None}, checkpoints=False)  # type: ignore[dict-item]
    assert [phase.name for phase in plan.phases] == ["generate", "load", "KL"]


@pytest.mark.parametrize(("advantage", "trained"), [("gae", 2), ("rloo", 1)])
def test_plan_of_ppo_has_the_models_of_its_folders(
    inputs: dict[str, Path], tmp_path: Path, advantage: str, trained: int
) -> None:
    (tmp_path / "prompts").mkdir()
    prompts = [Prompt(prompt="It is", id=str(number)) for number in range(4)]
    save_dataset(tmp_path / "prompts", {"train": prompts}, max_tokens=64, counts={})
    ppo = {"advantage": advantage, "minibatch": 8, "rollout": {"num_prompts": 4, "samples_per_prompt": 2}}
    config = PpoStageConfig(
        model=ModelConfig(precision="fp32"),
        ppo=PpoConfig.model_validate(ppo),
        checkpoint=CheckpointConfig(),
        seed=0,
    )
    model = inputs["base_model"]
    found = []
    for reward_model in (model, None):
        paths = {"sft_model": model, "prompts": tmp_path / "prompts", "reward_model": reward_model}
        plan = plan_here("ppo", config, paths, checkpoints=False)  # type: ignore[arg-type]
        assert plan is not None
        (update,) = [dict(phase.device) for phase in plan.phases if phase.name == "update"]
        found.append((update["reward model"] > 0, round(update["optimizer"] / update["weights"], 3)))
        assert update["weights"] == pytest.approx(trained * update["reference"], rel=0.1)  # the head has one output
    assert found == [(True, 2.0), (False, 2.0)]  # two moments of every trained weight


def test_peaks_are_the_largest_of_all_ranks() -> None:
    class Ranks:
        world_size, rank = 1, 0

        def gather(self, items: list[tuple[int, int]]) -> list[tuple[int, int]]:
            return [*items, (2**50, 0), (5, 7)]

    memory = StageMemory()
    memory.observe(Ranks())  # type: ignore[arg-type]
    assert (memory.main_peak, memory.gpu_peak) == (2**50, 7)


def test_checkpoint_that_was_not_saved_is_not_planned() -> None:
    update = Phase(name="update", device={}, main={"x": GIB})
    checkpoint = Phase(name="checkpoint", device={}, main={"x": 3 * GIB})
    memory = StageMemory(StagePlan(stage="sft", num_processes=1, on_gpu=False, phases=(update, checkpoint)))
    memory.observe()
    assert memory.numbers(saved=True)["memory/planned_gib"] == 3
    assert memory.numbers(saved=False)["memory/planned_gib"] == 1


def test_peak_of_a_process_is_that_of_the_kernel() -> None:
    before = main_peak()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert main_peak() >= before
    assert sentence({"memory/peak_gib": 1.5}) == "memory: 1.50 GiB at most in a process"
