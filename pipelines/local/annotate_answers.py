"""Reads what people answered: the file of `kfp-rlhf annotate --page`, and exports of Argilla and Label Studio."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.rlhf.data.files import read_json
from components.rlhf.text.errors import InputError

QUESTION = "better"  # of Argilla, and name of Label Studio's choices
ANSWERS = ("a", "b", "tie", "skip")
SHAPES = "answers.jsonl of --page, a list of records of Argilla, and JSON or JSON-MIN of Label Studio"


@dataclass(frozen=True, kw_only=True)
class Given:
    """An answer of a person to a pair: a, b, tie or skip."""

    pair: str
    rater: str
    answer: str
    time: str = ""  # ISO 8601 in UTC; empty if the export has none


def read_answers(path: Path) -> Iterator[tuple[str, Given]]:
    """The answers in a file of any of SHAPES, with their locations. Raises InputError with the location of what is none of them."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; pass the file with the answers.")
    for location, row in read_json(path):
        read = _reader(row)
        if read is None:
            raise InputError(f"{location} has no answers in a known form; known are {SHAPES}.")
        try:
            found = list(read(row))
        except (KeyError, TypeError, AttributeError, ValueError, LookupError) as error:
            raise InputError(f"{location} cannot be read as answers ({error!r}); export them again.") from None
        for given in found:
            if given.answer not in ANSWERS:
                raise InputError(f"{location} has the answer {given.answer[:40]!r}; it must be A, B, tie or skip.")
            if not given.rater.strip():
                raise InputError(f"{location} does not say who answered.")
            yield location, given


def _reader(row: Mapping[str, Any]) -> Any:
    if "answer" in row and "pair" in row:
        return _own
    if "annotations" in row and "data" in row:
        return _label_studio
    if "annotator" in row and "pair" in row:
        return _label_studio_min
    if isinstance(row.get("responses"), Mapping) and "id" in row:
        return _argilla
    if "id" in row and ("response_a" in row or f"{QUESTION}.responses" in row):
        return _argilla_flat
    return None


def _own(row: Mapping[str, Any]) -> Iterator[Given]:
    yield _given(row["pair"], row["rater"], row["answer"], row.get("time", ""))


def _argilla(row: Mapping[str, Any]) -> Iterator[Given]:
    """A record as `dataset.records.to_json` of Argilla 2 writes it, which leaves out whether a response was submitted."""
    for response in row["responses"].get(QUESTION, ()):
        if response.get("status", "submitted") == "submitted":
            yield _given(row["id"], response["user_id"], response["value"])


def _argilla_flat(row: Mapping[str, Any]) -> Iterator[Given]:
    """A record as `to_list(flatten=True)` and `to_datasets` of Argilla 2 give it."""
    values = row.get(f"{QUESTION}.responses") or ()
    users = row.get(f"{QUESTION}.responses.users") or ()
    states = row.get(f"{QUESTION}.responses.status") or ["submitted"] * len(values)
    for value, user, state in zip(values, users, states, strict=True):
        if state in (None, "submitted"):
            yield _given(row["id"], user, value)


def _label_studio(row: Mapping[str, Any]) -> Iterator[Given]:
    """A task with its annotations, as Label Studio exports JSON."""
    for annotation in row["annotations"]:
        person = annotation["completed_by"]
        if isinstance(person, Mapping):
            person = person.get("email") or person["id"]
        results = [result for result in annotation["result"] if result.get("from_name") == QUESTION]
        skipped = annotation.get("was_cancelled") or not results
        answer = "skip" if skipped else _only(results[-1]["value"]["choices"])
        yield _given(row["data"]["pair"], person, answer, annotation.get("updated_at", ""))


def _label_studio_min(row: Mapping[str, Any]) -> Iterator[Given]:
    """An annotation of a task, as Label Studio exports JSON-MIN."""
    person = row["annotator"]
    if isinstance(person, Mapping):
        person = person.get("email") or person["id"]
    yield _given(row["pair"], person, row.get(QUESTION, "skip"), row.get("updated_at", ""))


def _only(choices: list[Any]) -> Any:
    (choice,) = choices
    return choice


def _given(pair: Any, rater: Any, answer: Any, time: Any = "") -> Given:
    if isinstance(rater, float | bool) or not isinstance(rater, str | int):
        raise TypeError("a rater must be a text or a number")
    return Given(pair=str(pair), rater=str(rater), answer=str(answer).strip().lower(), time=str(time))
