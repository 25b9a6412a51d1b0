"""The cases of test_processes.py: `torchrun -m tests.support.evaluation_cases FOLDER MODELS`; the results of rank 0 go to FOLDER."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import components.evaluation.compare as compare_module
import components.rlhf.models.actor as actor_module
from components.evaluation.compare import Comparison, compare
from components.evaluation.judging import judge_by_reward_models
from components.evaluation.ranks import Ranks
from components.reward_model.calibration import sample_responses
from components.reward_model.imported import measure_imported
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.judge import RewardModelJudge
from components.rlhf.config.model import ModelConfig, SamplingConfig, TrainingConfig
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.records import Prompt, ValidationSample
from components.rlhf.engine.group import SINGLE_PROCESS, join_process_group
from components.rlhf.engine.protocol import Group
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.saving import save_model
from components.rlhf.rewards.judges import JudgeEntry, JudgeResources
from components.rlhf.text.progress import Progress
from tests.support.comparisons import GOOD
from tests.support.reward_model_runs import HELDOUT
from tests.support.reward_model_runs import config_of as reward_config_of
from tests.support.tiny_model import make_tiny_model

FP32, CPU = torch.float32, torch.device("cpu")
# Ranks get different numbers of rows (7 and 6 in two processes), of tokens, of passes and of pieces of logits.
TEXTS = ["It is", "We", "A film that nobody has seen, and that everybody talks about", "So", "It", "One", "They"]
PROMPTS = [Prompt(prompt=text, id=str(i)) for i, text in enumerate(TEXTS)]
PASS_TOKENS, PIECE = 24, 3
SHARDED = TrainingConfig(engine="deepspeed", zero_stage=3, num_processes=2, microbatch_tokens=64)
VALIDATION = [
    ValidationSample(
        iteration=1, num_rollouts=4, prompt=prompt, prompt_ids=[5, 6 + i], response_ids=[7, 8, 9][: i + 1],
        response="x", truncated=True, score=0.0, kl=0.0,
    )
    for i, prompt in enumerate(PROMPTS[:3])
]  # fmt: skip


def make_models(folder: Path, *, tied: bool = True) -> dict[str, Path]:
    """The models of a comparison; large enough that ZeRO-3 shards their matrices, and for vLLM on a CPU."""
    paths = {name: folder / name for name in ("sft_model", "policy", "reward_model")}
    if not folder.exists():
        for seed, name in enumerate(("sft_model", "policy")):
            make_tiny_model(paths[name], seed=seed, hidden_size=128, tied=tied)
        scale_norm(paths["policy"] / "model.safetensors")
        reward = load_scalar_lm(paths["policy"], num_frozen_layers=0, dtype=FP32, seed=1)
        reward.config.reward_mean, reward.config.reward_std = 0.5, 0.01
        save_model(reward, AutoTokenizer.from_pretrained(paths["policy"]), paths["reward_model"], dtype=FP32)
    return paths


def scale_norm(file: Path) -> None:
    """Norms of random models are all 1; that of a trained policy differs from the SFT model's."""
    weights = load_file(file)
    weights["model.norm.weight"] *= 1.25
    save_file(weights, file, metadata={"format": "pt"})


def make_trained(source: Path, target: Path, *, step: float, dtype: torch.dtype) -> Path:
    """A copy of a model with other layers, by about step in each value of their matrices, and the same norms and embeddings."""
    shutil.copytree(source, target)
    weights, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        moved = (
            weight + step * torch.randn(weight.shape, generator=generator) if name.endswith("proj.weight") else weight
        )
        weights[name] = moved.to(dtype)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def config_of(*, rollout: EngineConfig | None = None, frozen: int = 0, **changes: Any) -> EvaluationStageConfig:
    sampling = SamplingConfig(**({"max_new_tokens": 6, "batch_size": 4} | changes.pop("sampling", {})))
    return EvaluationStageConfig(
        model=ModelConfig(precision="fp32", num_frozen_layers=frozen),
        evaluation=EvaluationConfig(num_samples=2, **changes),
        sampling=sampling,
        rollout=rollout or EngineConfig(),
        gate=GateConfig(),
        seed=0,
    )


def numbers_of(comparison: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = {"kl": comparison.kl, "exact_kl": comparison.exact_kl, "groups": comparison.groups}
    for name, responses in (("sft", comparison.sft), ("ppo", comparison.policy)):
        found[f"{name}_ids"] = [c.response_ids for c in responses.completions]
        found[f"{name}_cut"] = [c.response_ids for c in responses.cut]
        found[f"{name}_rewards"] = responses.rewards
    return found


def compare_in_passes(models: Path, ranks: Ranks, **changes: Any) -> dict[str, Any]:
    """A comparison in small passes and pieces of logits, and what a judge that is a reward model says about it."""
    folders = make_models(models)
    vocab_size = len(AutoTokenizer.from_pretrained(folders["sft_model"]))
    with (
        mock.patch.object(compare_module, "MICROBATCH_TOKENS", PASS_TOKENS),
        mock.patch.object(actor_module, "MAX_LOGITS", PIECE * vocab_size),
    ):
        comparison = compare(
            config_of(**changes), PROMPTS, **folders, progress=Progress("evaluation", silent=True), ranks=ranks
        )
    assert not ranks.loaded
    entry = JudgeEntry(settings=RewardModelJudge(kind="reward_model", name="reward_model"), agreement=GOOD)
    resources = JudgeResources(precision="fp32", storage=StorageConfig(), log=lambda _: None)
    (judged,) = judge_by_reward_models([entry], models, comparison, VALIDATION, resources, ranks)
    judge = {"wins": judged.wins.tolist(), "scores": judged.policy_scores, "validation": judged.validation_scores}
    return numbers_of(comparison) | {f"judge_{name}": value for name, value in judge.items()}


def measure_reward_model(
    models: Path, target: Path, training: TrainingConfig, group: Group = SINGLE_PROCESS
) -> dict[str, float]:
    """Calibrate and measure an imported reward model on responses of the SFT model, and save it."""
    folders, config = make_models(models), reward_config_of(num_calibration_samples=5)
    responses = sample_responses(config, folders["sft_model"], PROMPTS, group)
    config = config.model_copy(update={"reward_model": config.reward_model.model_copy(update={"training": training})})
    texts = {"pairs": HELDOUT[:5], "responses": responses, "max_tokens": 64}
    result = measure_imported(folders["reward_model"], config, folders["sft_model"], texts, lambda _: None, group)
    if group.rank == 0:
        save_model(result.model.lm, result.tokenizer, target, dtype=FP32, weights=result.weights)
    else:
        for _ in result.weights or ():
            pass
    return result.numbers


def bytes_before_and_after_release(models: Path, ranks: Ranks) -> tuple[int, int]:
    """Bytes of this rank's weights of a model that computes, and those that are left after its release."""
    actor = ranks.actor(ranks.load_lm(make_models(models)["policy"]), num_frozen_layers=0)

    def held() -> int:
        tensors = [t for p in actor.parameters() for t in (p, getattr(p, "ds_tensor", None)) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    before = held()
    ranks.release()
    return before, held()


def main(folder: Path, models: Path) -> None:
    with join_process_group(timeout_minutes=5) as group:
        results: dict[str, Any] = {}
        for name, training in (("whole", TrainingConfig(microbatch_tokens=64)), ("sharded", SHARDED)):
            ranks = Ranks(group=group, dtype=FP32, device=CPU, training=training)
            results[name] = compare_in_passes(models, ranks)
            results[f"{name} reward model"] = measure_reward_model(models, folder / name, training, group)
            results[f"{name} bytes"] = bytes_before_and_after_release(models, ranks)
        few = Ranks.of(config_of(), group)
        folders = make_models(models)
        config = config_of()
        one_row = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_samples": 1})})
        comparison = compare(one_row, PROMPTS[:1], **folders, progress=Progress("evaluation", silent=True), ranks=few)
        results["one row"] = numbers_of(comparison)
        given = comparison.sft.completions
        again = compare(
            one_row,
            PROMPTS[:1],
            **folders,
            progress=Progress("evaluation", silent=True),
            ranks=few,
            sft_completions=given,
        )
        results["one row, its SFT response given"] = numbers_of(again)
        if group.rank == 0:
            (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
