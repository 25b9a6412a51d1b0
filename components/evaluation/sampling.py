"""Samples both models on the held-out prompts with the same seeds, one model after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from components.evaluation.ranks import Ranks
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.engine.shares import over_ranks
from components.rlhf.environments.factory import open_player
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.rollout.factory import create_rollout_engine
from components.rlhf.rollout.probe import probe_ids
from components.rlhf.rollout.protocol import Sampler
from components.rlhf.runtime.memory import release_models
from components.rlhf.text.progress import Progress

Row = tuple[Prompt, int]  # a prompt, and the seed of its response


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The responses of one model, and proof of what was sampled from."""

    completions: list[Completion]  # one per row, on every rank
    probe: Tensor  # [T] log-probs of the text of rollout/probe.py in the engine


def row_seed(seed: int, row: int) -> int:
    """The seed of the responses of all models in a row."""
    return derive_seed("evaluation", seed, row)


def sample_models(
    config: EvaluationStageConfig,
    prompts: Sequence[Prompt],
    folders: Sequence[tuple[str, Path]],
    ranks: Ranks,
    progress: Progress,
    *,
    code: Path | None = None,
) -> dict[str, Sampled]:
    """The responses of each model (name, folder) to the prompts, of which there is one for each row. The engine is freed afterwards.

    Both models play the same environment, if there is one, whose modules may be in the folder code.
    Each rank samples a share of the rows. One engine serves all models, which have the same architecture and tokenizer.
    """
    # All models get the same seed for a row, so that they differ only in their weights.
    rows = [(prompt, row_seed(config.seed, row)) for row, prompt in enumerate(prompts)]
    (_, first), *_ = folders
    engine = create_rollout_engine(first, config.rollout, config.longest_sampling, prompts, dtype=ranks.dtype)
    sampler: Sampler = open_player(engine, config.environment, log=progress.log, code=code) or engine
    sampled: dict[str, Sampled] = {}
    try:
        for name, folder in folders:
            ranks.group.watchdog(f"evaluation, weights of the {name} model")
            if sampled:
                engine.load(folder)
            probe = engine.prompt_logprobs(probe_ids(engine.tokenizer))
            completions = _sample(sampler, name, rows, config, ranks, progress)
            sampled[name] = Sampled(completions=completions, probe=probe)
    finally:
        sampler.close()
        engine.close()
        release_models()
    return sampled


def _sample(
    sampler: Sampler,
    name: str,
    rows: Sequence[Row],
    config: EvaluationStageConfig,
    ranks: Ranks,
    progress: Progress,
) -> list[Completion]:
    # vLLM forms batches itself, and ranks that share an engine must call it equally often; the other engine shows its progress.
    size = len(rows) if config.rollout.engine == "vllm" else config.sampling.batch_size

    def generate(own: list[Row]) -> list[Completion]:
        found: list[Completion] = []
        for start in range(0, len(own), size):
            ranks.group.watchdog(f"evaluation, responses of the {name} model")
            batch = own[start : start + size]
            found += sampler.generate([prompt for prompt, _ in batch], config.sampling, [seed for _, seed in batch])
            progress.step(len(found), len(own), {}, unit=f"{name} model responses")
        return found

    return over_ranks(ranks.group, rows, generate)
