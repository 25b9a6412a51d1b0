"""Movie-review snippets with human sentiment ratings, from the sdist of vaderSentiment (MIT).

10,605 snippets, each rated by 15 or more people from -4 to +4 (Hutto and Gilbert, "VADER", ICWSM 2014). The texts belong to
third parties: they are downloaded when needed and are not part of this repository. Preference pairs are derived from the
sentiment ratings; no person compared the two texts of a pair directly.
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
PROMPT_WORDS = 4  # length of a prompt, which is the beginning of a snippet
MAX_BYTES = 256 * 2**20  # limit of an unpacked archive; the real one has 40 MiB
MIN_WORDS = 6  # shorter snippets leave nothing to complete


def read_movie_ratings(sdist: Path) -> list[RatedText]:
    """Each snippet, split into its first four words and the rest, with the mean of its ratings.

    The means are computed from the raw ratings, because those in the text file are rounded. Raises InputError for any other archive.
    """
    texts = {key: fields[1] for key, *fields in _read_table(sdist, TEXTS, num_columns=3)}
    rated = []
    for key, _mean, _std, ratings in _read_table(sdist, RATINGS, num_columns=4):
        words = texts.get(key, "").split()
        if len(words) < MIN_WORDS:
            continue
        rated.append(
            RatedText(
                prompt=" ".join(words[:PROMPT_WORDS]),
                completion=" " + " ".join(words[PROMPT_WORDS:]),
                rating=_mean_rating(sdist, ratings),
            )
        )
    return rated


def _mean_rating(sdist: Path, ratings: str) -> float:
    try:
        numbers = parse_json(ratings)
        if not isinstance(numbers, list) or not numbers or any(type(n) not in (int, float) for n in numbers):
            raise NotJsonError("not a list of numbers")
        mean = statistics.fmean(numbers)
        if not math.isfinite(mean):
            raise NotJsonError("values too large")
        return mean
    except (NotJsonError, OverflowError) as error:
        raise InputError(
            f"{sdist}: the ratings {ratings[:40]!a} cannot be parsed ({error}); download it again."
        ) from None


def _read_table(sdist: Path, name: str, *, num_columns: int) -> list[list[str]]:
    try:
        with sdist.open("rb") as file:
            inner = _read_member(file, "hutto_ICWSM_2014.tar.gz")
        # Some ids inside the files are preceded by a stray byte-order mark, which would keep their rows from joining.
        text = _read_member(io.BytesIO(inner), name).decode("utf-8").replace("\ufeff", "")
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError) as error:
        raise InputError(
            f"{sdist} is not the vaderSentiment 3.3.2 sdist with its ratings ({error}); download it again."
        ) from error
    rows = (line.split("\t", num_columns - 1) for line in text.splitlines())
    return [[cell.strip() for cell in row] for row in rows if len(row) == num_columns]


class _LimitedGzipReader(io.RawIOBase):
    """Decompresses a gzip stream; raises OSError beyond MAX_BYTES, independent of the sizes in the archive's headers."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._remaining = gzip.GzipFile(fileobj=file), MAX_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size if size >= 0 else MAX_BYTES, self._remaining + 1))
        self._remaining -= len(data)
        if self._remaining < 0:
            raise OSError(f"it unpacks to more than {MAX_BYTES // 2**20} MiB")
        return data


def _read_member(archive: IO[bytes], suffix: str) -> bytes:
    """Content of the first regular file of a .tar.gz whose name ends with suffix, without writing to disk."""
    with tarfile.open(fileobj=_LimitedGzipReader(archive), mode="r|") as tar:
        for member in tar:
            if member.name.endswith(suffix) and member.isreg():
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                return content.read()
    raise OSError(f"{suffix} is missing")
