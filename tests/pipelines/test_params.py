"""Every params file of pipelines/params is valid and compiles."""

from pathlib import Path

import pytest
from kfp import components

from pipelines.compile import compile_pipeline
from pipelines.settings import load_params, settings_of_stage

FILES = sorted((Path(__file__).resolve().parents[2] / "pipelines" / "params").glob("*.yaml"))
STAGES = ("prepare_data", "sft", "reward_model", "judge", "ppo", "evaluation")


def test_params_files_for_cpu_one_gpu_and_eight_gpus_exist() -> None:
    assert {path.stem for path in FILES} >= {"movie_reviews", "tiny", "qwen2.5_0.5b_1gpu", "llama3_8b_8gpu"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_params_file_compiles(path: Path, tmp_path: Path) -> None:
    params = load_params(path)
    for stage in STAGES:
        assert settings_of_stage(params, stage)
    compiled = components.load_component_from_file(str(compile_pipeline(params, tmp_path / "pipeline.yaml")))
    assert compiled.name == "rlhf"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_placeholders_are_marked(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        assert any(part in line for part in ("path: data/", "my-bucket")) == ("# YOURS" in line), line


def test_8_gpu_params_use_zero_3_in_8_processes() -> None:
    ppo = load_params(next(path for path in FILES if path.stem == "llama3_8b_8gpu")).ppo
    assert (ppo.training.engine, ppo.training.num_processes, ppo.training.zero_stage) == ("deepspeed", 8, 3)
    assert ppo.training.gradient_checkpointing and ppo.rollout.engine == "vllm"
    assert ppo.training.learning_rate == 5e-7  # overrides the rate of the anchor
