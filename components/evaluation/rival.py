"""The evaluation of the other policy of a run, and the responses of the SFT model in it, which are not sampled again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from components.evaluation.better import Outcome
from components.evaluation.compare import Comparison
from components.evaluation.sampling import row_seed
from components.rlhf.artifacts.manifest import Fact, Manifest
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.policy import TITLES, Method
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.text.comparison_table import method_of
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

SPLIT = "sft_responses"
SAMPLED_WITH = "sampled_with"  # fact: digest of all settings that decide what is sampled
# What both evaluations must have in common, by the roles of their inputs.
SHARED = {"sft_model": "SFT model", "prompts": "prompts", "judge": "judges"}


@dataclass(frozen=True, kw_only=True)
class SampledResponse:
    """A response of the SFT model and the policy's in the same row, as they are kept."""

    id: str  # of the prompt
    seed: int
    prompt_ids: list[int]
    response_ids: list[int]
    response: str
    truncated: bool
    policy_response: str


@dataclass(frozen=True, kw_only=True)
class Rival:
    """The evaluation of the other policy."""

    method: Method
    outcome: Outcome
    numbers: Mapping[str, float]
    sft: list[Completion]  # one per row
    responses: list[str]  # of the other policy, one per row
    measurements: Mapping[str, float]  # time and memory of its training
    training: list[dict[str, float]] = field(default_factory=list)  # the judges' curve of its training
    facts: Mapping[str, Fact] = field(default_factory=dict)  # of the manifest of its evaluation


def sampling_digest(config: EvaluationStageConfig) -> str:
    """SHA-256 of the settings that decide which responses the SFT model gives."""
    evaluation = config.evaluation
    content = {
        "sampling": config.sampling.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json"),
        "precision": config.model.precision,
        "rows": [evaluation.num_prompts, evaluation.num_samples],
        "seed": config.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_responses(comparison: Comparison, seed: int, folder: Path) -> None:
    """Write sft_responses.jsonl, a line per row."""
    pairs = zip(comparison.sft.completions, comparison.policy.completions, strict=True)
    with (folder / f"{SPLIT}.jsonl").open("w", encoding="utf-8") as file:
        for row, (sft, policy) in enumerate(pairs):
            record = SampledResponse(
                id=sft.prompt.id,
                seed=row_seed(seed, row),
                prompt_ids=sft.prompt_ids,
                response_ids=sft.response_ids,
                response=sft.response,
                truncated=sft.truncated,
                policy_response=policy.response,
            )
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def open_rival(
    folder: Path,
    manifest: Manifest,
    inputs: Mapping[str, Manifest],
    config: EvaluationStageConfig,
    prompts: Sequence[Prompt],
) -> Rival:
    """The evaluation in folder, whose manifest is verified. inputs are those of this evaluation, by the kinds of their artifacts.

    Raises InputError unless it compares the other policy with the same SFT model, on the same prompts with the same seeds and sampling,
    by the same judges.
    """
    for role, name in SHARED.items():
        if manifest.parents.get(role) != inputs[role].digest:
            raise InputError(f"The rival {folder} is an evaluation with other {name}; evaluate its policy again.")
    if manifest.facts.get(SAMPLED_WITH) != sampling_digest(config):
        raise InputError(
            f"The rival {folder} was sampled with other settings (sampling, rollout, number of prompts or samples, precision or seed); "
            "evaluate its policy again."
        )
    numbers, method = _read_numbers(folder), str(manifest.facts.get("method"))
    if method not in TITLES or method != method_of(numbers) or method == config.method:
        raise InputError(
            f"The rival {folder} evaluates a policy of {TITLES.get(method, 'no known method')}, and this one too, or its numbers are of "
            "another one; pass the evaluation of the run's other policy."
        )
    rows = load_records(folder, SPLIT, SampledResponse)
    expected = [prompt for prompt in prompts for _ in range(config.evaluation.num_samples)]
    found = [(row.id, row.seed) for row in rows]
    if found != [(prompt.id, row_seed(config.seed, number)) for number, prompt in enumerate(expected)]:
        raise InputError(f"The rival {folder} has responses to other prompts or seeds; evaluate its policy again.")
    return Rival(
        method=method_of(numbers),
        outcome=outcome_of(method_of(numbers), str(manifest.facts.get("decision")), numbers),
        numbers=numbers,
        sft=[_completion(row, prompt) for row, prompt in zip(rows, expected, strict=True)],
        responses=[row.policy_response for row in rows],
        measurements=manifest.measurements,
        training=_read_training(folder),
        facts=manifest.facts,
    )


def outcome_of(method: Method, decision: str, numbers: Mapping[str, float]) -> Outcome:
    return Outcome(method=method, decision=decision, win_rate=numbers.get("win_rate"), kl=numbers["kl"])


def _read_numbers(folder: Path) -> dict[str, float]:
    try:
        content = parse_json((folder / "evaluation.json").read_bytes())
        numbers = {str(name): float(value) for name, value in content.items()}
        return numbers | {"kl": numbers["kl"]}
    except (OSError, NotJsonError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}/evaluation.json has no numbers of an evaluation ({error}); evaluate it again."
        ) from None


def _read_training(folder: Path) -> list[dict[str, float]]:
    """The validation passes of the training; [] if the evaluation has none."""
    path = folder / "training.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [{str(name): float(value) for name, value in parse_json(line).items()} for line in lines]
    except (OSError, NotJsonError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} has no validation passes ({error}); evaluate it again.") from None


def _completion(row: SampledResponse, prompt: Prompt) -> Completion:
    return Completion(
        prompt=prompt,
        prompt_ids=row.prompt_ids,
        response_ids=row.response_ids,
        response=row.response,
        logprobs=None,
        truncated=row.truncated,
    )
