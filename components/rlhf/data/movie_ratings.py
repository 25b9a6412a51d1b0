"""Movie-review snippets with human sentiment ratings, from the sdist of vaderSentiment (MIT).

10,605 snippets, each rated by 15 or more people from -4 to +4 (Hutto and Gilbert, "VADER", ICWSM 2014). The texts are third
parties' and are fetched at set-up, never kept in this repository. Preference pairs made from them are derived from people's
sentiment ratings; nobody compared the two texts of a pair side by side.
"""

import gzip
import io
import math
import statistics
import tarfile
import zlib
from pathlib import Path
from typing import IO

from components.rlhf.data.records import RatedText
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

TEXTS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"
PROMPT_WORDS = 4  # a prompt is the opening of a snippet, this long
MAX_BYTES = 256 * 2**20  # that an archive may unpack to; the real one has 40 MiB
MIN_WORDS = 6  # shorter snippets leave nothing to complete


def read_movie_ratings(sdist: Path) -> list[RatedText]:
    """Each snippet split into its first four words and the rest, with the mean of all its ratings.

    The means are computed from the raw ratings; the file of texts carries rounded ones. Raises InputError for another archive.
    """
    texts = {key: fields[1] for key, *fields in _read_table(sdist, TEXTS, num_columns=3)}
    rated = []
    for key, _mean, _spread, ratings in _read_table(sdist, RATINGS, num_columns=4):
        words = texts.get(key, "").split()
        if len(words) < MIN_WORDS:
            continue
        rated.append(
            RatedText(
                prompt=" ".join(words[:PROMPT_WORDS]),
                completion=" " + " ".join(words[PROMPT_WORDS:]),
                rating=_parse_mean(sdist, ratings),
            )
        )
    return rated


def opening(text: str, num_words: int) -> str:
    """The first words of a text, as one key."""
    return " ".join(text.split()[:num_words]).casefold()


def _parse_mean(sdist: Path, ratings: str) -> float:
    try:
        numbers = parse_json(ratings)
        if not isinstance(numbers, list) or not numbers or any(type(n) not in (int, float) for n in numbers):
            raise NotJsonError("no list of numbers")
        mean = statistics.fmean(numbers)
        if not math.isfinite(mean):
            raise NotJsonError("too large")
        return mean
    except (NotJsonError, OverflowError) as error:
        raise InputError(f"{sdist}: the ratings {ratings[:40]!a} cannot be read ({error}); fetch it again.") from None


def _read_table(sdist: Path, name: str, *, num_columns: int) -> list[list[str]]:
    try:
        with sdist.open("rb") as file:
            inner = _member(file, "hutto_ICWSM_2014.tar.gz")
        # Stray byte-order marks stand inside the files, in front of some ids; without them every row joins.
        text = _member(io.BytesIO(inner), name).decode("utf-8").replace("\ufeff", "")
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError) as error:
        raise InputError(
            f"{sdist} is not the vaderSentiment 3.3.2 sdist with its ratings ({error}); fetch it again."
        ) from error
    rows = (line.split("\t", num_columns - 1) for line in text.splitlines())
    return [[cell.strip() for cell in row] for row in rows if len(row) == num_columns]


class _Bounded(io.RawIOBase):
    """What a compressed stream unpacks to, and an error where that is more than MAX_BYTES, whatever the headers say."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = gzip.GzipFile(fileobj=file), MAX_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size if size >= 0 else MAX_BYTES, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {MAX_BYTES // 2**20} MiB")
        return data


def _member(archive: IO[bytes], ending: str) -> bytes:
    """The first ordinary file whose name ends so, of a .tar.gz; nothing is written anywhere."""
    with tarfile.open(fileobj=_Bounded(archive), mode="r|") as tar:
        for member in tar:
            if member.name.endswith(ending) and member.isreg():
                content = tar.extractfile(member)
                assert content is not None  # it is an ordinary file
                return content.read()
    raise OSError(f"no {ending} in it")
