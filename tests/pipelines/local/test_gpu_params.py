"""A dry run of every params file for GPUs on this CPU: its own settings, except sizes, with tiny models of the same architecture."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.rlhf.config.params import Params
from pipelines.settings import load_params
from tests.support.chat_models import HIDDEN_SIZE, make_chat_model, write_chat_data
from tests.support.resident import Resident

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.deepspeed]
ROOT = Path(__file__).resolve().parents[3]
TRAINING_STAGES = ("sft", "reward_model", "ppo")


def uses_gpus(path: Path) -> bool:
    params = load_params(path)
    return any(params.cluster.num_accelerators(stage) for stage in TRAINING_STAGES)


FILES = [path for path in sorted((ROOT / "pipelines" / "params").glob("*.yaml")) if uses_gpus(path)]


def sizes(params: Params, folder: Path) -> dict[str, Any]:
    """The settings that differ from the file's: sources, and everything that is a size."""
    sources = {name: getattr(params.data, name) for name in ("demonstrations", "preferences", "prompts")}
    files = write_chat_data(folder, {name: source for name, source in sources.items() if source is not None})
    changes: dict[str, Any] = {
        "model.source": str(make_chat_model(params.model.source, folder / "model")),
        "model.revision": None,
        **{f"data.{name}.path": str(path) for name, path in files.items()},
        **{f"data.{name}.format": "jsonl" for name in files},
        "data.held_out": 0.3,
        "data.num_validation_prompts": 4,
        "data.max_prompt_tokens": 200,
        "data.max_tokens": 300,
        "sft.max_steps": 3,
        "sft.batch_size": 6,
        "reward_model.max_steps": 3,
        "reward_model.batch_size": 6,
        "reward_model.num_calibration_samples": 8,
        "ppo.num_iterations": 2,
        "ppo.rollout.num_prompts": 8,
        "ppo.rollout.sampling.max_new_tokens": 12,
        "ppo.rollout.sampling.batch_size": 8,
        "ppo.rollout.vllm.kv_cache_gib": 0.1,
        "ppo.rollout.vllm.tensor_parallel_size": min(params.ppo.rollout.vllm.tensor_parallel_size, 2),
        "ppo.minibatch": 4,
        "ppo.eval_every": min(params.ppo.eval_every, 1),
        "evaluation.num_prompts": 8,
        "evaluation.num_bootstrap": 100,
        "gate.max_kl": 1000.0,
    }
    for stage in TRAINING_STAGES:  # several microbatches per step
        changes[f"{stage}.training.microbatch_tokens"] = 320
    for name, profile in params.cluster.profiles.items():
        changes[f"cluster.profiles.{name}.num_accelerators"] = min(profile.num_accelerators, 2)
        changes[f"cluster.profiles.{name}.num_nodes"] = 1
    return changes


@pytest.fixture(scope="module", params=FILES, ids=[path.stem for path in FILES])
def dry_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, resident: Resident
) -> tuple[Params, Path]:
    """The settings of the file with other sizes, and the run directory."""
    folder = tmp_path_factory.mktemp("gpu")
    changes = sizes(load_params(request.param), folder)
    settings = [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in changes.items()]
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", "run", str(request.param), "--out", str(folder / "run"), *options]
    result = resident.run(command, timeout=900)
    logs = "".join(path.read_text()[-4000:] for path in sorted(folder.glob("run/logs/*.log")))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    return load_params(request.param, settings), folder / "run"


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def artifact(run: Path, stage: str, name: str) -> Path:
    (found,) = (run / "artifacts").glob(f"*/{stage}/{name}")
    return found


def test_some_params_files_use_gpus() -> None:
    assert {"llama3_8b_8gpu", "qwen2.5_0.5b_1gpu"} <= {path.stem for path in FILES}


def test_run_ends_with_a_decision(dry_run: tuple[Params, Path]) -> None:
    _, run = dry_run
    summary = summary_of(run)
    assert summary["status"] == "succeeded"
    assert isinstance(summary["promoted"], bool)
    assert "win_rate" in summary["evaluation"]
    assert {stage["status"] for stage in summary["stages"].values()} == {"succeeded"}


def test_stages_use_the_engines_of_the_file(dry_run: tuple[Params, Path]) -> None:
    params, run = dry_run
    stages = summary_of(run)["stages"]
    for stage in TRAINING_STAGES:
        training, name = getattr(params, stage).training, stages[stage]["engines"]["training"]
        assert name.startswith(f"{training.engine} ")
        assert (f"ZeRO-{training.zero_stage}" in name) == (training.engine == "deepspeed")
        assert name.endswith(", 2 processes") == (training.num_processes > 1)
    rollout = {"vllm": "vllm", "hf": "transformers"}[params.ppo.rollout.engine]
    assert stages["ppo"]["engines"]["rollout"].startswith(rollout)


def test_policy_starts_as_the_reference_and_both_engines_agree(dry_run: tuple[Params, Path]) -> None:
    params, run = dry_run
    history = [json.loads(line) for line in (artifact(run, "ppo", "model") / "history.jsonl").read_text().splitlines()]
    assert len(history) == 2
    assert history[0]["kl/sequence"] == 0.0
    assert all(row["actor/first_ratio_error"] == 0.0 for row in history)
    # bf16 moves a logit of this model by about 0.01.
    assert all(row["engine_gap/mean"] < (0.05 if params.model.precision == "bf16" else 1e-4) for row in history)
    assert all(math.isfinite(value) for row in history for value in row.values())


def test_prompts_are_rendered_once_by_the_template_of_the_model(dry_run: tuple[Params, Path]) -> None:
    _, run = dry_run
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    rows = (artifact(run, "ppo", "model") / "validation.jsonl").read_text().splitlines()
    assert rows
    for prompt in {json.loads(row)["prompt"]["prompt"] for row in rows}:
        (question,) = re.findall(r"What do you think of the \w+ \d+\?", prompt)
        turn = {"role": "user", "content": question}
        whole = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        assert prompt.startswith(whole[:10])
        assert prompt.endswith(whole[whole.index(question) :])
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == (1 if tokenizer.bos_token else 0)


def test_policy_loads_in_transformers(dry_run: tuple[Params, Path]) -> None:
    _, run = dry_run
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.hidden_size == HIDDEN_SIZE
