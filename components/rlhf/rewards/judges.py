"""The judge artifact: judges.json says what each judge is and how far it agrees with people; a folder NAME holds its weights."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from components.rlhf.config.judge import EndpointJudge as EndpointConfig
from components.rlhf.config.judge import Judge, RewardModelJudge
from components.rlhf.config.judge import LinearJudge as LinearConfig
from components.rlhf.config.model import Precision
from components.rlhf.config.scoring import VERIFIABLE, Function
from components.rlhf.config.storage import StorageConfig
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.rewards.agreement import MIN_ANSWERED, Agreement
from components.rlhf.rewards.answers import open_answers
from components.rlhf.rewards.endpoint import EndpointJudge
from components.rlhf.rewards.owner import JUDGE, Owner
from components.rlhf.rewards.protocol import PairwiseJudge, ScoreJudge, Scorer
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.rewards.rewards import Resources, open_scorer
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json_as

JUDGES = "judges.json"
MICROBATCH_TOKENS = 4096
MAX_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class JudgeEntry:
    """One judge in judges.json. agreement is None if it answered no held-out human pair."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    settings: Judge
    agreement: Agreement | None

    @property
    def cannot_tell(self) -> str:
        """Why the judge gives no verdict, as the end of a sentence; empty if it does, as one that verifies answers always does."""
        if isinstance(self.settings, VERIFIABLE):
            return ""
        if self.agreement is None:
            return "it answered none of the held-out human pairs"
        if self.agreement.num_pairs < MIN_ANSWERED * self.agreement.num_asked:
            return f"it answered only {self.agreement.num_pairs} of {self.agreement.num_asked} held-out human pairs"
        if self.agreement.is_above_chance:
            return ""
        return f"its agreement with people, {self.agreement.explain()}, is not above chance"


@dataclass(frozen=True, kw_only=True)
class OpenJudge:
    """A judge that is ready to compare responses. scorer is None if it only compares, and gives no scores."""

    entry: JudgeEntry
    pairwise: PairwiseJudge
    scorer: Scorer | None


@dataclass(frozen=True, kw_only=True)
class JudgeResources:
    """What judges compute with and where the answers of endpoints are kept."""

    precision: Precision
    storage: StorageConfig
    log: Callable[[str], None]
    load_scorer: Callable[[Path], Scorer] | None = None  # of a reward model folder; None loads it whole in this process
    code: Path | None = None  # folder with the modules and programs of the user

    def load_reward_scorer(self, folder: Path) -> Scorer:
        """The scorer of a reward model folder."""
        if self.load_scorer is not None:
            return self.load_scorer(folder)
        dtype = compute_dtype(self.precision)
        return load_reward_scorer(folder, dtype=dtype, device=default_device(), microbatch_tokens=MICROBATCH_TOKENS)


def save_judges(directory: Path, entries: Sequence[JudgeEntry]) -> None:
    """Write judges.json."""
    content = [
        {
            "settings": e.settings.model_dump(mode="json"),
            "agreement": None if e.agreement is None else asdict(e.agreement),
        }
        for e in entries
    ]
    (directory / JUDGES).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_judges(directory: Path) -> list[JudgeEntry]:
    """The entries of a judge artifact, of which the first decides. Raises InputError for an invalid file."""
    path = directory / JUDGES
    try:
        with path.open("rb") as file:
            entries = parse_json_as(TypeAdapter(list[JudgeEntry]), file.read(MAX_BYTES + 1)[:MAX_BYTES])
        names = [entry.settings.title for entry in entries]
        if not entries or len(set(names)) < len(names):
            raise NotJsonError("it needs judges with different names")
        numbers = [value for e in entries if e.agreement for value in asdict(e.agreement).values()]
        if not all(math.isfinite(value) for value in numbers):
            raise NotJsonError("a number is not finite")
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a loadable list of judges ({reason}); run the judge stage again.") from None
    return entries


def read_judges_of(configs: Sequence[Judge], directory: Path) -> list[JudgeEntry]:
    """The entries of a judge artifact. Raises InputError unless they are the judges of the settings.

    Their code and addresses come from the settings of a run, never from a file that another one may have written.
    """
    entries = read_judges(directory)
    if [entry.settings for entry in entries] != list(configs):
        raise InputError(f"{directory} has other judges than the settings of this run; run the judge stage again.")
    return entries


def open_judge(entry: JudgeEntry, directory: Path, resources: JudgeResources) -> OpenJudge:
    """Load a judge. directory is the artifact, which holds the weights of the judges that have any."""
    config, folder = entry.settings, directory / entry.settings.title
    if isinstance(config, EndpointConfig):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", config.model)[:60]
        endpoint = EndpointJudge(config, open_answers(resources.storage, slug, resources.log), resources.log)
        return OpenJudge(entry=entry, pairwise=endpoint, scorer=None)
    scorer: Scorer
    if isinstance(config, LinearConfig):
        from components.rlhf.rewards.linear import load_linear_judge  # imports scikit-learn

        scorer = load_linear_judge(folder)
    elif isinstance(config, RewardModelJudge):
        scorer = resources.load_reward_scorer(folder)
    else:
        owner = JUDGE if isinstance(config, Function) else Owner(title=f"judge {config.title}", key="judge")
        scorer = open_scorer(
            config, owner, Resources(storage=resources.storage, log=resources.log, code=resources.code)
        )
    return OpenJudge(entry=entry, pairwise=ScoreJudge(scorer), scorer=scorer)
