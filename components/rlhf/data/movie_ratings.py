"""Movie-review snippets with human sentiment ratings, from the sdist of vaderSentiment (MIT).

10,605 snippets, each rated by 15 or more people from -4 to +4 (Hutto and Gilbert, "VADER", ICWSM 2014). The texts are third
parties' and are fetched at set-up, never kept in this repository. Preference pairs made from them are derived from people's
sentiment ratings; nobody compared the two texts of a pair side by side.
"""

import ast
import io
import statistics
import tarfile
from pathlib import Path

from components.rlhf.data.records import RatedText
from components.rlhf.errors import InputError

TEXTS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"
PROMPT_WORDS = 4  # a prompt is the opening of a snippet, this long
MIN_WORDS = 6  # shorter snippets leave nothing to complete


def read_movie_ratings(sdist: Path) -> list[RatedText]:
    """Each snippet split into its first four words and the rest, with the mean of all its ratings.

    The means are computed from the raw ratings; the file of texts carries rounded ones. Raises InputError for another archive.
    """
    texts = {key: fields[1] for key, *fields in _table(sdist, TEXTS, num_columns=3)}
    rated = []
    for key, _mean, _spread, ratings in _table(sdist, RATINGS, num_columns=4):
        words = texts.get(key, "").split()
        if len(words) < MIN_WORDS:
            continue
        rated.append(
            RatedText(
                prompt=" ".join(words[:PROMPT_WORDS]),
                completion=" " + " ".join(words[PROMPT_WORDS:]),
                rating=statistics.fmean(ast.literal_eval(ratings)),
            )
        )
    return rated


def opening(text: str, num_words: int) -> str:
    """The first words of a text, as one key."""
    return " ".join(text.split()[:num_words]).casefold()


def _table(sdist: Path, name: str, *, num_columns: int) -> list[list[str]]:
    try:
        with tarfile.open(sdist) as outer:
            inner_name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
            inner_bytes = outer.extractfile(inner_name)
            assert inner_bytes is not None
            with tarfile.open(fileobj=io.BytesIO(inner_bytes.read())) as inner:
                member = inner.extractfile(name)
                assert member is not None
                # Stray byte-order marks stand inside the files, in front of some ids; without them every row joins.
                text = member.read().decode("utf-8").replace("\ufeff", "")
    except (OSError, EOFError, tarfile.TarError, StopIteration, KeyError, AssertionError, UnicodeDecodeError) as error:
        raise InputError(
            f"{sdist} is not the vaderSentiment 3.3.2 sdist with its ratings ({error}); fetch it again."
        ) from error
    rows = (line.split("\t", num_columns - 1) for line in text.splitlines())
    return [[cell.strip() for cell in row] for row in rows if len(row) == num_columns]
