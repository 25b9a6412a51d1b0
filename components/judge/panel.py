"""Builds each judge from its settings, and measures its agreement with people on held-out pairs."""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.judge.summary import describe_linear
from components.rlhf.artifacts.manifest import MANIFEST
from components.rlhf.config.judge import EndpointJudge, Judge, LinearJudge, RewardModelJudge
from components.rlhf.config.scoring import VERIFIABLE
from components.rlhf.data.records import Completion, PreferencePair, RatedText
from components.rlhf.rewards.agreement import measure_agreement
from components.rlhf.rewards.judges import JudgeEntry, JudgeResources, open_judge, save_judges
from components.rlhf.rewards.protocol import PairwiseJudge, ScoreJudge
from components.rlhf.text.errors import InputError

MAX_PAIRS, MAX_PAIRS_OF_REWARD_MODEL = 2000, 384


@dataclass(frozen=True, kw_only=True)
class BuiltJudge:
    """A judge that can compare, and how its weights are saved."""

    pairwise: PairwiseJudge
    save: Callable[[Path], object] | None = None  # writes the weights to an empty folder; None if there are none
    numbers: dict[str, float] = field(default_factory=dict)
    notes: str = ""  # Markdown for the summary


@dataclass(frozen=True, kw_only=True)
class MeasuredJudge:
    entry: JudgeEntry
    numbers: dict[str, float]
    save: Callable[[Path], object] | None
    notes: str

    def describe(self) -> str:
        """One line for the log."""
        name, agreement, reason = self.entry.settings.title, self.entry.agreement, self.entry.cannot_tell
        if isinstance(self.entry.settings, VERIFIABLE):
            return f"judge {name} verifies answers, and needs no agreement with people"
        if reason:
            return f"judge {name} cannot tell, because {reason}; the gate gives no verdict by it"
        return f"judge {name} agrees with people on {agreement.explain() if agreement else ''}"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What judges are made of. Only the judges see it."""

    ratings: Sequence[RatedText]
    pairs: Sequence[PreferencePair]
    reward_model: Path | None  # folder of the second reward model


def build_panel(
    configs: Sequence[Judge],
    heldout: Sequence[PreferencePair],
    as_completion: Callable[[PreferencePair, str], Completion],
    data: TrainingData,
    resources: JudgeResources,
    *,
    seed: int,
) -> list[MeasuredJudge]:
    """Build and measure all judges. as_completion makes a Completion of one text of a pair."""
    judges = []
    for config in configs:
        built = build_judge(config, data, resources, seed=seed)
        measured = measure_judge(config, built, heldout, as_completion, seed=seed)
        resources.log(measured.describe())
        judges.append(measured)
    return judges


def build_judge(config: Judge, data: TrainingData, resources: JudgeResources, *, seed: int) -> BuiltJudge:
    """Fit a linear judge, load a reward model, or connect to an endpoint or a function."""
    if isinstance(config, LinearJudge):
        from components.rlhf.rewards.linear import fit_linear_judge  # imports scikit-learn

        judge, quality = fit_linear_judge(config, data.ratings, data.pairs, seed=seed)
        numbers = {
            "num_ratings": float(len(data.ratings)),
            "num_training_pairs": 0.0 if data.ratings else float(len(data.pairs)),
            "num_features": float(len(judge.coefficients)),
            **{f"quality_{features}": value for features, value in quality.items()},
        }
        notes = describe_linear(judge, quality, of_ratings=bool(data.ratings))
        return BuiltJudge(pairwise=ScoreJudge(judge), save=judge.save, numbers=numbers, notes=notes)
    if isinstance(config, RewardModelJudge):
        folder = data.reward_model
        if folder is None:
            raise InputError("The judge is a reward model, but --reward-model is missing; pass the model's folder.")
        scorer = resources.load_reward_scorer(folder)
        return BuiltJudge(pairwise=ScoreJudge(scorer), save=lambda target: link_files(folder, target))
    opened = open_judge(JudgeEntry(settings=config, agreement=None), Path(), resources)
    return BuiltJudge(pairwise=opened.pairwise)


def measure_judge(
    config: Judge,
    built: BuiltJudge,
    pairs: Sequence[PreferencePair],
    as_completion: Callable[[PreferencePair, str], Completion],
    *,
    seed: int,
) -> MeasuredJudge:
    """Compare the two texts of held-out pairs. Judges that take fewer pairs than others take the first ones of the same order.

    A judge that verifies answers compares none: pairs have no right answer.
    """
    if isinstance(config, VERIFIABLE):
        entry = JudgeEntry(settings=config, agreement=None)
        return MeasuredJudge(entry=entry, numbers={"num_unanswered": 0.0}, save=built.save, notes=built.notes)
    limit = config.num_pairs if isinstance(config, EndpointJudge) else MAX_PAIRS
    if isinstance(config, RewardModelJudge):
        limit = MAX_PAIRS_OF_REWARD_MODEL
    chosen_pairs = random.Random(seed).sample(list(pairs), len(pairs))[:limit]
    preferences = built.pairwise.compare(
        [as_completion(pair, pair.chosen) for pair in chosen_pairs],
        [as_completion(pair, pair.rejected) for pair in chosen_pairs],
    )
    agreement = measure_agreement(preferences.wins, chosen_pairs, preferences.consistent)
    numbers = {"num_unanswered": float(preferences.num_unanswered), **preferences.counts, **built.numbers}
    if agreement is not None:
        numbers |= {
            "heldout_accuracy": agreement.accuracy,
            "heldout_accuracy_low": agreement.low,
            "heldout_accuracy_high": agreement.high,
            "num_heldout_pairs": float(agreement.num_pairs),
            "longer_text_accuracy": agreement.longer_wins,
            "consistency": agreement.consistency,
        }
    entry = JudgeEntry(settings=config, agreement=agreement)
    return MeasuredJudge(entry=entry, numbers=numbers, save=built.save, notes=built.notes)


def metrics_of(judges: Sequence[MeasuredJudge]) -> dict[str, float]:
    """The metrics of the first judge under their own names, and those of the others as NAME/METRIC."""
    first, *others = judges
    return first.numbers | {
        f"{j.entry.settings.title}/{name}": value for j in others for name, value in j.numbers.items()
    }


def save_panel(judges: Sequence[MeasuredJudge], directory: Path) -> None:
    """Write the weights of each judge to a folder of its name, and judges.json."""
    for judge in judges:
        if judge.save:
            folder = directory / judge.entry.settings.title
            folder.mkdir()
            judge.save(folder)
    save_judges(directory, [judge.entry for judge in judges])


def link_files(source: Path, target: Path) -> None:
    """Hard links to the files of a model folder without its manifest, or copies on another file system."""
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name != MANIFEST):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)
