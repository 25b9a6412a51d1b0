import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from components.rlhf.data.movie_ratings import read_movie_ratings
from components.rlhf.data.records import RatedText
from components.rlhf.text.errors import InputError

TEXTS = (
    "1_1\t0.1\ta film of great charm and wit\n"
    "\ufeff1_2\t-2\tdull from the start to its end , I fear\n"  # a stray byte-order mark before the id
    "1_3\t3\tonly five words are here\n"
    "1_4\t1\tit has no ratings here at all\n"
    "not a table row\n"
)
RATINGS = (
    "1_1\t9.9\t1.0\t[1, 2, 2, 2]\n"  # mean 1.75, not the one in the file
    "1_2\t9.9\t1.0\t[-2, -1]\r\n"
    "1_3\t9.9\t1.0\t[0]\n"
    "1_5\t9.9\t1.0\t[4]\n"  # no text
)
Build = Callable[..., Path]


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """An archive inside an archive, like the sdist."""

    def sdist(
        texts: bytes = TEXTS.encode(), ratings: bytes = RATINGS.encode(), inner: str = "hutto_ICWSM_2014.tar.gz"
    ) -> Path:
        folder = "hutto_ICWSM_2014/movieReviewSnippets_"
        files = {f"{folder}GroundTruth.txt": texts, f"{folder}anonDataRatings.txt": ratings}
        path = tmp_path / "sdist.tar.gz"
        path.write_bytes(archive({"v/README": b"", f"v/additional_resources/{inner}": archive(files)}))
        return path

    return sdist


def test_read_movie_ratings(build: Build) -> None:
    assert read_movie_ratings(build()) == [
        RatedText(prompt="a film of great", completion=" charm and wit", rating=1.75),
        RatedText(prompt="dull from the start", completion=" to its end , I fear", rating=-1.5),
    ]


def test_snippets_shorter_than_six_words_are_dropped(build: Build) -> None:
    texts = b"1_1\t0\tone two three four five six\n1_2\t0\tone two three four five\n"
    assert [text.completion for text in read_movie_ratings(build(texts))] == [" five six"]


def test_archive_without_inner_archive_is_rejected(build: Build, tmp_path: Path) -> None:
    other = build(inner="something_else.tar.gz")
    with pytest.raises(InputError, match="is not the vaderSentiment 3.3.2 sdist with its ratings"):
        read_movie_ratings(other)


@pytest.mark.parametrize("content", [b"", b"PK not a tar", b"\x1f\x8b\x08 truncated"])
def test_file_that_is_not_an_archive_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar.gz").write_bytes(content)
    with pytest.raises(InputError, match="is not the vaderSentiment 3.3.2 sdist with its ratings"):
        read_movie_ratings(tmp_path / "x.tar.gz")


def test_truncated_archive_is_rejected(build: Build) -> None:
    path = build()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="download it again"):
        read_movie_ratings(path)


def test_archive_without_ratings_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(archive({"v/hutto_ICWSM_2014.tar.gz": archive({"hutto_ICWSM_2014/readme.txt": b""})}))
    with pytest.raises(InputError, match=r"movieReviewSnippets_GroundTruth\.txt"):
        read_movie_ratings(path)


def test_other_encoding_is_rejected(build: Build) -> None:
    with pytest.raises(InputError, match="is not the vaderSentiment 3.3.2 sdist"):
        read_movie_ratings(build(texts="1_1\t0\tcafé".encode("latin-1")))
