"""Artifacts of small models and data, and the options of sft, ppo and evaluation for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.config.judge import EndpointJudge
from components.rlhf.config.model import ModelConfig
from components.rlhf.config.sft import SftConfig, SftStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.datasets import save_dataset, save_records
from components.rlhf.data.records import Demonstration, Prompt, Turn
from components.rlhf.rewards.judges import JudgeEntry, save_judges
from tests.support.comparisons import GOOD
from tests.support.evaluation_cases import config_of as evaluation_config_of
from tests.support.evaluation_cases import make_models
from tests.support.ppo_runs import config_of, make_reward_model
from tests.support.tiny_model import make_tiny_model

OUTPUTS = {
    "sft": ("model", "metrics", "summary"),
    "ppo": ("model", "manifest", "metrics", "curves"),
    "evaluation": ("evaluation", "metrics", "report", "summary"),
}
PARAMETERS = {"evaluation": ("decision", "reason", "better")}
INPUTS = {
    "sft": ("base_model", "demonstrations"),
    "ppo": ("sft_model", "reward_model", "prompts"),
    "evaluation": ("sft_model", "policy", "reward_model", "judge", "prompts"),
}
EVERY_STEP = CheckpointConfig(every_minutes=0.0)


def write_inputs(folder: Path) -> None:
    """The input artifacts of both stages, in folders named by their options. The models have heads that vLLM supports on a CPU."""
    for name in ("base_model", "sft_model"):
        make_tiny_model(folder / name, seed=0, num_layers=2, hidden_size=128)
    make_reward_model(folder / "sft_model", folder / "reward_model")
    words = ("good", "fine", "bad", "dull")
    turns = [Turn(context=f"Film {n} is", answer=f" {words[n % 4]}") for n in range(24)]
    demonstrations = [Demonstration(turns=(turn,)) for turn in turns]
    prompts = [Prompt(prompt=f"Film {n} is", id=f"p{n}") for n in range(12)]
    data = {
        "demonstrations": {"train": demonstrations[:16], "heldout": demonstrations[16:]},
        "prompts": {"train": prompts[:8], "validation": prompts[8:]},
    }
    for name, splits in data.items():
        (folder / name).mkdir()
        save_dataset(folder / name, splits, max_tokens=60, counts={})
    for name in (*INPUTS["sft"], *INPUTS["ppo"]):
        write_manifest(folder / name, kind=name, parents={})


def write_evaluation_inputs(folder: Path, judge: EndpointJudge) -> None:
    """The input artifacts of the evaluation: 40 prompts, and a judge that agrees with people."""
    make_models(folder)
    save_records(folder / "policy", "validation", ())
    for name in ("judge", "prompts"):
        (folder / name).mkdir()
    prompts = [Prompt(prompt=f"Film {n} is", id=f"p{n}") for n in range(40)]
    save_dataset(folder / "prompts", {"heldout": prompts}, max_tokens=60, counts={})
    save_judges(folder / "judge", [JudgeEntry(settings=judge, agreement=GOOD)])
    for name in INPUTS["evaluation"]:
        write_manifest(folder / name, kind="policy_model" if name == "policy" else name, parents={})


def evaluation_settings(num_processes: int, judge: EndpointJudge) -> str:
    config = evaluation_config_of(num_processes=num_processes, timeout_minutes=3)
    return config.model_copy(update={"judge": judge}).canonical_json()


def sft_settings(num_processes: int, **training: Any) -> str:
    changes = {"num_processes": num_processes, "learning_rate": 1e-3, "timeout_minutes": 3} | training
    sft = SftConfig.model_validate({"max_steps": 3, "batch_size": 4, "training": changes})
    model = ModelConfig(precision="fp32")
    return SftStageConfig(model=model, sft=sft, checkpoint=EVERY_STEP, seed=3).canonical_json()


def ppo_settings(num_processes: int, *, rollout: dict[str, Any] | None = None, **ppo: Any) -> str:
    training = {"num_processes": num_processes, "timeout_minutes": 3} | ppo.pop("training", {})
    config = config_of(training=training, rollout=rollout or {}, **ppo)
    return config.model_copy(update={"checkpoint": EVERY_STEP}).canonical_json()


def options(stage: str, settings: str, inputs: Path, outputs: Path, checkpoints: Path) -> Sequence[str]:
    paths = {name: inputs / name for name in INPUTS[stage]} | {name: outputs / name for name in OUTPUTS[stage]}
    found = ["--settings", settings, "--tracking", '{"enabled": false}']
    found += ["--storage", f'{{"checkpoint_uri": "{checkpoints}"}}']
    return found + [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]
