"""Builds data sets without common prompts: read, filter, split by role, pair."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from components.prepare_data.sections import SectionReader, Sourced, texts_of
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.data.datasets import save_dataset
from components.rlhf.data.examples import Unusable
from components.rlhf.data.lengths import Lengths, fit_into_limits
from components.rlhf.data.near_duplicates import Overlap, group_near_duplicates, overlap
from components.rlhf.data.pairs import cap_per_prompt, pairs_from_ratings, pairs_per_prompt
from components.rlhf.data.reading import uses_chat_template
from components.rlhf.data.records import Demonstration, LabeledText, PreferencePair, Prompt, RatedText
from components.rlhf.data.render import Renderer
from components.rlhf.data.split import HELD_OUT, assign_role, split_key
from components.rlhf.data.tally import Tally
from components.rlhf.data.token_files import PackedText, save_tokens
from components.rlhf.data.tokenizer import Record
from components.rlhf.text.errors import InputError

FROM_RATINGS = "pairs from ratings"
TRAINED_ON = {
    "demonstrations": ("train", "heldout"),
    "preferences": ("train", "labeled"),
}  # splits whose ids a stage reads


@dataclass
class PreparedData:
    """Records of each role, and what happened to the records of each source."""

    is_chat: bool
    demonstrations: list[Demonstration] = field(default_factory=list)
    heldout_demonstrations: list[Demonstration] = field(default_factory=list)
    pairs: list[PreferencePair] = field(default_factory=list)
    labeled: list[LabeledText] = field(
        default_factory=list
    )  # rated answers of the pairs' prompts, with data.desirable_rating
    judge_pairs: list[PreferencePair] = field(default_factory=list)
    judge_ratings: list[RatedText] = field(default_factory=list)
    heldout_pairs: list[PreferencePair] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    validation_prompts: list[Prompt] = field(default_factory=list)
    heldout_prompts: list[Prompt] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)  # by the key of the source, such as data.prompts
    lengths: dict[str, list[Lengths]] = field(default_factory=dict)  # of the records of each section
    encoded: dict[tuple[str, ...], tuple[PackedText, ...]] = field(default_factory=dict)  # by the texts of a record
    num_keys: int = 0  # different prompts, by which the data was split
    num_groups: int = 0  # of near-duplicates among them
    overlap: Overlap | None = None  # prompts that two roles have in common, found in the data sets after the split

    def data_sets(self) -> dict[str, tuple[str, dict[str, Sequence[Record]]]]:
        """Kind and splits of each data set that the stage writes, by the name of its output."""
        return {
            "demonstrations": (
                "demonstrations",
                {"train": self.demonstrations, "heldout": self.heldout_demonstrations},
            ),
            "preferences": (
                "preferences",
                {"train": self.pairs, "heldout": self.heldout_pairs}
                | ({"labeled": self.labeled} if self.labeled else {}),
            ),
            "judge_preferences": (
                "preferences",
                {"train": self.judge_pairs, "ratings": self.judge_ratings, "heldout": self.heldout_pairs},
            ),
            "prompts": ("prompts", {"train": self.prompts, "validation": self.validation_prompts}),
            "heldout_prompts": ("prompts", {"heldout": self.heldout_prompts}),
        }

    def save(
        self,
        folder: Path,
        data_set: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        counts: dict[str, int],
    ) -> None:
        """Write a data set into the empty folder, with the ids of the splits that a stage trains on."""
        _, splits = self.data_sets()[data_set]
        save_dataset(folder, splits, max_tokens=max_tokens, counts=counts)
        for split in splits.keys() & set(TRAINED_ON.get(data_set, ())):
            texts = [text for record in splits[split] for text in self.encoded[texts_of(record)]]
            save_tokens(folder, split, texts, tokenizer, max_tokens=max_tokens)

    def texts_by_role(self, *, of_snippets: bool) -> dict[str, list[str]]:
        """The normalized prompts of all records of each role, or for movie snippets, of which prompts are the first words, the texts."""
        roles: dict[str, Sequence[Record]] = {
            "sft": self.demonstrations,
            "reward model": [*self.pairs, *self.labeled],
            "judge": [*self.judge_pairs, *self.judge_ratings],
            "ppo": [*self.prompts, *self.validation_prompts],
            "held out": [*self.heldout_demonstrations, *self.heldout_pairs, *self.heldout_prompts],
        }
        return {
            role: sorted({text for record in records for text in _compared_texts(record, of_snippets=of_snippets)})
            for role, records in roles.items()
        }


def _compared_texts(record: Record, *, of_snippets: bool) -> list[str]:
    """What a record must not have in common with those of another role, normalized."""
    match record:
        case PreferencePair() if of_snippets:
            texts = [record.prompt + record.chosen, record.prompt + record.rejected]
        case RatedText() | LabeledText() if of_snippets:
            texts = [record.prompt + record.completion]
        case Demonstration() if of_snippets:
            texts = [record.prompt + record.turns[0].answer]
        case _:
            texts = [record.prompt]
    return [split_key(text, record.conversation) for text in texts]


def prepare(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    num_evaluation_prompts: int,
    max_rows: int | None = None,
) -> PreparedData:
    """Build all data sets of one run. Raises InputError if a source is unusable or a role ends up empty.

    With max_rows only the first rows of each source are read, to look at them, and roles may be empty.
    """
    is_chat = uses_chat_template(
        data, data.keyed_sources(), has_template=bool(tokenizer.chat_template), max_rows=max_rows
    )
    renderer = Renderer(
        tokenizer=tokenizer, is_chat=is_chat, date=data.template_date, assistant_turns=data.assistant_turns
    )
    reader = SectionReader(data=data, renderer=renderer, tokenizer=tokenizer, seed=seed, max_rows=max_rows)
    sections, tallies = reader.read()
    out = PreparedData(is_chat=is_chat, tallies=tallies)
    out.lengths = {section: [each.lengths for each in records] for section, records in sections.items()}
    out.encoded = {texts_of(s.record): s.encoded for records in sections.values() for s in records if s.encoded}
    groups = _group_keys(sections, data)
    out.num_keys, out.num_groups = len(groups), len(set(groups.values()))
    roles = _assign_roles(sections, groups, data, seed)
    by_role: dict[str, dict[str, list[Sourced]]] = {name: defaultdict(list) for name in sections}
    for section, records in sections.items():
        for each in records:
            by_role[section][roles[groups[each.key]]].append(each)

    demonstrations, preferences, prompts = (by_role[name] for name in ("demonstrations", "preferences", "prompts"))
    out.demonstrations = [d for d in _records(demonstrations["sft"]) if isinstance(d, Demonstration)]
    out.heldout_demonstrations = [d for d in _records(demonstrations[HELD_OUT]) if isinstance(d, Demonstration)]
    pairing = Tally(name=FROM_RATINGS)
    out.pairs = _build_pairs(preferences["reward_model"], data, tokenizer, seed, pairing, out.encoded)
    if data.desirable_rating is not None:
        out.labeled = _label(_records(preferences["reward_model"]), data.desirable_rating, seed=seed)
    out.judge_pairs = _build_pairs(preferences["judge"], data, tokenizer, seed, pairing, out.encoded)
    out.judge_ratings = [r for r in _records(preferences["judge"]) if isinstance(r, RatedText)]
    out.heldout_pairs = _build_pairs(preferences[HELD_OUT], data, tokenizer, seed, pairing, out.encoded)
    if pairing.read:
        out.tallies[FROM_RATINGS] = pairing
    _split_prompts(out, prompts, data, seed)
    if max_rows is None:
        _require_enough(out, data, num_evaluation_prompts)
    of_snippets = any(source.format == "movie_ratings" for source in data.keyed_sources().values())
    out.overlap = overlap(out.texts_by_role(of_snippets=of_snippets), threshold=data.near_duplicates)
    return out


def _group_keys(sections: dict[str, list[Sourced]], data: DataConfig) -> dict[str, str]:
    """The group of every key: near-duplicates are in one group. Openings of movie snippets are groups already."""
    keys = sorted({each.key for records in sections.values() for each in records})
    movies = {each.key for records in sections.values() for each in records if each.source.format == "movie_ratings"}
    texts = [key for key in keys if key not in movies]
    groups = {
        text: texts[first]
        for text, first in zip(texts, group_near_duplicates(texts, threshold=data.near_duplicates), strict=True)
    }
    return {key: groups.get(key, key) for key in keys}


def _assign_roles(
    sections: dict[str, list[Sourced]], groups: dict[str, str], data: DataConfig, seed: int
) -> dict[str, str]:
    """The role of every group, given the roles that can use it."""
    weights = data.weights
    uses = {
        "demonstrations": {"sft": weights.sft},
        "preferences": {"reward_model": weights.reward_model, "judge": weights.judge},
        "prompts": {"prompts": weights.prompts},
    }
    eligible: dict[str, dict[str, float]] = defaultdict(dict)
    for section, records in sections.items():
        for each in records:
            eligible[groups[each.key]] |= uses[section]
    return {
        group: assign_role(group, weights_by_role, held_out=data.held_out, seed=seed)
        for group, weights_by_role in eligible.items()
    }


def _records(sourced: Sequence[Sourced]) -> list[object]:
    return [each.record for each in sourced]


def _build_pairs(
    preferences: Sequence[Sourced],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    tally: Tally,
    encoded: dict[tuple[str, ...], tuple[PackedText, ...]],
) -> list[PreferencePair]:
    """The pairs, given and built from ratings. The ids of built ones are added to encoded."""
    pairs = [each.record for each in preferences if isinstance(each.record, PreferencePair)]
    snippets, rated = (
        [
            each.record
            for each in preferences
            if isinstance(each.record, RatedText) and (each.source.format == "movie_ratings") == is_movies
        ]
        for is_movies in (True, False)
    )
    built = pairs_from_ratings(snippets, min_gap=data.min_rating_gap, seed=seed)
    built += pairs_per_prompt(rated, min_gap=data.min_rating_gap, seed=seed)
    for pair in built:
        tally.read += 1
        try:
            # The common prefix of two snippets may be longer than their prompts, so the limits are checked again.
            _, encoded[texts_of(pair)] = fit_into_limits(pair, data, tokenizer)
        except Unusable as error:
            tally.drop(error, "a pair")
            continue
        tally.kept += 1
        pairs.append(pair)
    return cap_per_prompt(pairs, data.max_pairs_per_prompt, seed=seed)


def _label(records: Sequence[object], desirable_rating: float, *, seed: int) -> list[LabeledText]:
    """The rated answers as desirable or not, shuffled with the seed. Raises InputError if there are none of one kind."""
    rated = [record for record in records if isinstance(record, RatedText)]
    random.Random(seed).shuffle(rated)
    labeled = [
        LabeledText(
            prompt=text.prompt,
            completion=text.completion,
            is_desirable=text.rating >= desirable_rating,
            conversation=text.conversation,
        )
        for text in rated
    ]
    found = {text.is_desirable for text in labeled}
    if len(found) == 1:
        ratings = [text.rating for text in rated]
        kind = "desirable" if True in found else "undesirable"
        raise InputError(
            f"data.desirable_rating is {desirable_rating:g}, which labels all {len(rated)} answers as {kind}: their ratings are from "
            f"{min(ratings):g} to {max(ratings):g}; set it between them."
        )
    return labeled


def _split_prompts(out: PreparedData, prompts: dict[str, list[Sourced]], data: DataConfig, seed: int) -> None:
    train, held_out = ([p for p in _records(prompts[role]) if isinstance(p, Prompt)] for role in ("prompts", HELD_OUT))
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(held_out)
    numbered = [replace(p, id=f"train-{number}") for number, p in enumerate(train)]
    cut = min(data.num_validation_prompts, len(numbered) // 4)
    out.validation_prompts, out.prompts = numbered[:cut], numbered[cut:]
    out.heldout_prompts = [replace(p, id=f"heldout-{number}") for number, p in enumerate(held_out)]


def _require_enough(out: PreparedData, data: DataConfig, num_evaluation_prompts: int) -> None:
    rated = out.tallies.get(FROM_RATINGS)
    if data.desirable_rating is not None and not out.labeled:
        raise InputError(
            "data.desirable_rating labels rated answers, and no answer of data.preferences is left with a rating or a label; give rows of "
            "prompt, completion and rating (or label), or set data.desirable_rating to null."
        )
    if (
        not out.labeled
        and not out.pairs
        and not out.judge_pairs
        and not out.heldout_pairs
        and (rated or out.judge_ratings)
    ):
        raise InputError(
            "No prompt of data.preferences has two answers whose ratings differ by data.min_rating_gap "
            f"({data.min_rating_gap}) and that fit into data.max_tokens; a reward model learns from pairs, so give at least a good "
            "and a bad answer to the same prompt, or lower data.min_rating_gap."
        )
    needed: dict[str, Sequence[Record]] = {"prompts": out.prompts}
    if data.preferences:
        judged = out.judge_ratings or out.judge_pairs
        needed |= {
            role: records
            for role, records in (("reward_model", out.pairs or out.labeled), ("judge", judged))
            if getattr(data.weights, role) > 0  # 0: the run trains none
        }
    if data.demonstrations:
        needed["sft"] = out.demonstrations
    for role, records in needed.items():
        if not records:
            similar = (
                f" {out.num_keys} prompts form only {out.num_groups} groups of near-duplicates, which share a role; raise "
                "data.near_duplicates to tell them apart."
                if out.num_groups < 0.5 * out.num_keys
                else ""
            )
            raise InputError(
                f"No records are left for {role} after splitting; raise data.weights.{role} or add data.{similar}"
            )
    if len(out.heldout_prompts) < num_evaluation_prompts:
        raise InputError(
            f"Only {len(out.heldout_prompts)} prompts are held out, but evaluation.num_prompts is {num_evaluation_prompts}; "
            "raise data.held_out, add prompts, or lower evaluation.num_prompts."
        )
    # Labeled answers may have no partners; only a judge is then measured on pairs.
    needs_pairs = not out.labeled or data.weights.judge > 0
    if data.preferences and needs_pairs and len(out.heldout_pairs) == 0:
        raise InputError("No preference pairs are held out to measure accuracy on; raise data.held_out or add pairs.")
