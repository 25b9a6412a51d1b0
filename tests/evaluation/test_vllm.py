"""The comparison and the calibration with rollouts from the real vLLM, on a CPU: one engine for both models, in one and two processes."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.evaluation.compare import Comparison, compare
from components.evaluation.ranks import Ranks
from components.reward_model.calibration import sample_responses
from components.rlhf.config.model import ModelConfig
from components.rlhf.config.rollout import EngineConfig, VllmConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.records import Completion
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.vllm import VllmRolloutEngine
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from tests.support.evaluation_cases import FP32, PROMPTS, compare_in_passes, config_of, make_models, make_trained
from tests.support.reward_model_runs import config_of as reward_config_of
from tests.support.tiny_model import make_tiny_model
from tests.support.vllm_memory import references_to, require_freed

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
VLLM = EngineConfig(engine="vllm", vllm=VllmConfig(kv_cache_gib=0.05))
PROGRESS = Progress("evaluation", silent=True)


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    """The engine sets environment variables, which must not leak into other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("vllm") / "models", tied=request.param)


@pytest.fixture(scope="module")
def compared(folders: dict[str, Path]) -> tuple[Comparison, list[weakref.ref[Any]]]:
    """A comparison by vLLM, and weak references to the engine, its scheduler and its weights."""
    held: list[weakref.ref[Any]] = []

    class Watched(VllmRolloutEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            held.extend(references_to(self._llm))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("components.rlhf.rollout.vllm.VllmRolloutEngine", Watched)
        return compare(config_of(rollout=VLLM), PROMPTS, **folders, progress=PROGRESS), held


def logprobs_of(folder: Path, completions: list[Completion]) -> list[Tensor]:
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=FP32)
    rows = collate([c.prompt_ids for c in completions], [c.response_ids for c in completions])
    with torch.no_grad():
        found, _ = Actor(lm, num_frozen_layers=0, dtype=FP32)(rows, SamplingDistribution())
    return [row[: len(c.response_ids)] for row, c in zip(found, completions, strict=True)]


def gap(folder: Path, completions: list[Completion]) -> float:
    """The largest difference between the log-probs of the engine as it sampled and those of a model."""
    expected = logprobs_of(folder, completions)
    return max((c.logprobs - own).abs().max().item() for c, own in zip(completions, expected, strict=True))


def test_each_model_samples_with_its_own_weights(compared: tuple[Comparison, Any], folders: dict[str, Path]) -> None:
    comparison, _ = compared
    assert len(comparison.groups) == 2 * len(PROMPTS)
    assert (
        gap(folders["sft_model"], comparison.sft.completions)
        < 1e-4
        < gap(folders["policy"], comparison.sft.completions)
    )
    assert (
        gap(folders["policy"], comparison.policy.completions)
        < 1e-4
        < gap(folders["sft_model"], comparison.policy.completions)
    )


def test_kl_is_that_of_the_sampled_tokens(compared: tuple[Comparison, Any], folders: dict[str, Path]) -> None:
    comparison, _ = compared
    reference = logprobs_of(folders["sft_model"], comparison.policy.completions)
    for c, kl, ref in zip(comparison.policy.completions, comparison.kl, reference, strict=True):
        assert kl == pytest.approx(float(c.logprobs.sum() - ref.sum()), abs=1e-3)


def test_closed_engine_returns_its_memory(compared: tuple[Comparison, list[weakref.ref[Any]]]) -> None:
    require_freed(compared[1])
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "models"
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def calibration(tied: Path) -> list[Completion]:
    config = reward_config_of(num_calibration_samples=5).model_copy(update={"rollout": VLLM})
    return sample_responses(config, tied / "sft_model", PROMPTS)


def test_calibration_samples_the_sft_model_after_other_engines_of_the_process(
    calibration: list[Completion], tied: Path
) -> None:
    assert len(calibration) == 5
    assert gap(tied / "sft_model", calibration) < 1e-4


@pytest.fixture(scope="module")
def running(tied: Path) -> Iterator[VllmRolloutEngine]:
    """One engine in bf16 for all cases that follow."""
    engine = VllmRolloutEngine(
        tied / "sft_model", VLLM.vllm, stop_ids=(0,), dtype=torch.bfloat16, max_model_len=200, num_sequences=16
    )
    yield engine
    engine.close()


@pytest.fixture
def shared(running: VllmRolloutEngine, tied: Path, monkeypatch: pytest.MonkeyPatch) -> VllmRolloutEngine:
    """The engine with the SFT model, which the comparison gets instead of one of its own."""
    running.load(tied / "sft_model")
    monkeypatch.setattr("components.evaluation.sampling.create_rollout_engine", lambda *_, **__: running)
    monkeypatch.setattr(VllmRolloutEngine, "close", lambda _: None)
    return running


def compare_in_bf16(models: Path, policy: Path) -> Comparison:
    config = config_of(rollout=VLLM).model_copy(update={"model": ModelConfig(precision="bf16")})
    folders = {"sft_model": models / "sft_model", "policy": policy, "reward_model": models / "reward_model"}
    return compare(config, PROMPTS, **folders, progress=PROGRESS)


def test_policy_of_another_architecture_is_refused(shared: VllmRolloutEngine, tied: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=3, hidden_size=128, num_layers=2)
    with pytest.raises(
        InputError, match=r"other/config.json is of another architecture .* \(num_hidden_layers differs\)"
    ):
        compare_in_bf16(tied, other)


def test_reload_that_changes_nothing_is_detected_by_values(
    shared: VllmRolloutEngine, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmRolloutEngine, "_reload", lambda self, **_: None)
    with pytest.raises(InputError, match="has other values of .* from which it was loaded"):
        compare_in_bf16(tied, tied / "policy")


@pytest.mark.parametrize("step", [1e-4, 1e-3])
def test_reload_that_changes_nothing_is_detected_by_logprobs(
    shared: VllmRolloutEngine, tied: Path, tmp_path: Path, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy has the SFT model's norms and embeddings, as after LoRA: the engine shows no value that differs."""
    policy = make_trained(tied / "sft_model", tmp_path / "policy", step=step, dtype=torch.bfloat16)
    compared = compare_in_bf16(tied, policy)
    assert min(compared.exact_kl) > 0
    shared.load(tied / "sft_model")
    with monkeypatch.context() as broken:
        broken.setattr(VllmRolloutEngine, "_reload", lambda self, **_: None)
        with pytest.raises(InputError, match="did not load the PPO model"):
            compare_in_bf16(tied, policy)


def test_responses_of_other_weights_are_refused(
    shared: VllmRolloutEngine, tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a check of the weights that sees nothing, the log-probs still show it."""
    monkeypatch.setattr(VllmRolloutEngine, "load", lambda self, folder: 1)
    with pytest.raises(InputError, match="did not sample from the PPO model: log-probs of the probe differ by"):
        compare_in_bf16(tied, tied / "policy")


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from components.evaluation.ranks import Ranks
from components.rlhf.config.rollout import EngineConfig, VllmConfig
from components.rlhf.engine.group import join_process_group
from components.reward_model.calibration import sample_responses
from tests.support.evaluation_cases import PROMPTS, compare_in_passes, config_of
from tests.support.reward_model_runs import config_of as reward_config_of
models, target, results = Path(sys.argv[1]), Path(sys.argv[2]), {}
with join_process_group(timeout_minutes=5) as group:
    for parallel in (1, 2):
        rollout = EngineConfig(engine="vllm", vllm=VllmConfig(kv_cache_gib=0.05, tensor_parallel_size=parallel))
        changes = dict(rollout=rollout, shard_weights=True, num_processes=2, sampling={"temperature": 0.01})
        ranks = Ranks.of(config_of(**changes), group)
        assert ranks.shards_weights
        results[str(parallel)] = compare_in_passes(models, ranks, **changes)
    rollout = EngineConfig(engine="vllm", vllm=VllmConfig(kv_cache_gib=0.05))
    config = reward_config_of(num_calibration_samples=5).model_copy(update={"rollout": rollout})
    responses = sample_responses(config, models / "sft_model", PROMPTS, group)
    results["calibration"] = [c.response_ids for c in responses]
    if group.rank == 0:
        target.write_text(json.dumps(results))
"""


@pytest.mark.deepspeed
def test_two_processes_with_engines_of_their_own_or_a_shared_one_and_sharded_weights(
    tmp_path: Path, tied: Path, calibration: list[Completion]
) -> None:
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.py"), str(tied), str(tmp_path / "results.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads((tmp_path / "results.json").read_text())
    one = compare_in_passes(tied, Ranks.of(config_of()), rollout=VLLM, sampling={"temperature": 0.01})
    for parallel in ("1", "2"):
        found = results[parallel]
        for name, expected in one.items():
            if name.endswith(("ids", "cut", "groups", "wins")):
                assert found[name] == expected, (parallel, name)
            else:
                assert found[name] == pytest.approx(expected, rel=1e-3, abs=1e-2), (parallel, name)
    assert results["calibration"] == [c.response_ids for c in calibration]
