"""Files that a judge refers to, a rubric or the source of a function, are copied into the params when they are loaded."""

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.rlhf.config.judge import MAX_JUDGES_BYTES, EndpointJudge, FunctionJudge, as_list
from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.settings import dump_yaml, load_params, settings_of_stage
from tests.support.planted_secrets import PLANTED

DATA = {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "preferences", "prompts")}
ENDPOINT = {"kind": "endpoint", "url": "https://api.example.com/v1", "model": "gpt"}
FUNCTION = {"kind": "function", "function": "my_judge:score"}
SOURCE = 'def score(prompts, responses):\n\t"""Länge."""\n\treturn [len(text) for text in responses]  # "a" \'b\'\n'
RUBRIC = "Prefer the response that\n\n  - answers the question: yes or no?\n\t- is short.  \n# not a comment\n"
ONE_ARGUMENT = 128 * 1024  # bytes of one argument of a program, which Linux limits


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is not the folder of the params file."""
    (tmp_path / "params").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def folder(home: Path) -> Path:
    """The folder of the params file."""
    return home.parent / "params"


def write(folder: Path, judge: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"data": DATA, "judge": judge}), encoding="utf-8")
    return path


def load(folder: Path, judge: Any, *overrides: str) -> Params:
    return load_params(write(folder, judge), overrides)


def rubric_of(params: Params) -> str:
    (judge,) = params.endpoint_judges
    assert isinstance(judge, EndpointJudge) and judge.rubric_file is None
    return judge.rubric


def source_of(params: Params) -> str:
    (judge,) = (judge for judge in as_list(params.judge) if isinstance(judge, FunctionJudge))
    return judge.source


def load_error(folder: Path, judge: Any, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, judge, *overrides)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


# --- overrides


def test_kind_can_be_chosen_by_overrides(folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump({"data": DATA}))
    (folder / "rubric.txt").write_text(RUBRIC)
    overrides = ["judge.kind=endpoint", "judge.url=http://h:1/v1/", "judge.model=org/m", "judge.rubric_file=rubric.txt"]
    params = load_params(folder / "run.yaml", overrides)
    assert (params.endpoint_judges[0].url, params.endpoint_judges[0].model) == ("http://h:1/v1", "org/m")
    assert rubric_of(params) == RUBRIC
    second = load_params(folder / "run.yaml", ["judge.kind=reward_model", "judge.use=org/rm"])
    assert second.reward_model_judge is not None and second.reward_model_judge.use == "org/rm"
    several = load_params(folder / "run.yaml", ["judge=[{kind: linear}, {kind: reward_model}]"])
    assert [judge.title for judge in as_list(several.judge)] == ["linear", "reward_model"]
    body = load_params(folder / "run.yaml", [*overrides, "judge.extra_body={reasoning_effort: low}"])
    assert body.endpoint_judges[0].extra_body == {"reasoning_effort": "low"}
    nested = load_params(folder / "run.yaml", [*overrides, "judge.extra_body.temperature=1e-1"])
    assert nested.endpoint_judges[0].extra_body == {"temperature": 0.1}


def test_mistakes_in_overrides(folder: Path) -> None:
    assert load_error(folder, {}, "judge.kind=gpt").endswith(
        "judge is {'kind': 'gpt'}: kind is not one of linear, reward_model, endpoint, function, exact_match, regex, numeric, "
        "json_schema, command; correct it."
    )
    assert load_error(folder, {}, "judge.kind=endpoint").endswith("judge.url is missing; judge.model is missing.")
    assert "did you mean judge.rubric_file?" in load_error(folder, ENDPOINT, "judge.rubric_fil=a.txt")
    assert load_error(folder, [{}], "judge.kind=linear") == "--set 'judge.kind=linear': judge is not a section."


# --- rubric_file


def test_rubric_is_relative_to_the_params_file_or_the_working_directory(home: Path, folder: Path) -> None:
    judge = ENDPOINT | {"rubric_file": "texts/rubric.md"}
    (folder / "texts").mkdir()
    (folder / "texts/rubric.md").write_text(RUBRIC, encoding="utf-8")
    assert rubric_of(load(folder, judge)) == RUBRIC
    (home / "texts").mkdir()
    (home / "texts/rubric.md").write_text("of the working directory", encoding="utf-8")
    assert rubric_of(load(folder, judge)) == RUBRIC
    assert rubric_of(load(folder, judge | {"rubric_file": str(folder / "texts/rubric.md")})) == RUBRIC
    assert rubric_of(load(folder, judge | {"rubric_file": "../params/texts/rubric.md"})) == RUBRIC
    (folder / "texts/rubric.md").unlink()
    assert rubric_of(load(folder, judge)) == "of the working directory"


def test_rubric_of_a_home_directory(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    (home / "mine.txt").write_text("prefer short")
    assert rubric_of(load(folder, ENDPOINT | {"rubric_file": "~/mine.txt"})) == "prefer short"
    message = load_error(folder, ENDPOINT | {"rubric_file": "~nobody-of-this-name/mine.txt"})
    assert message.startswith("judge.rubric_file: ~nobody-of-this-name/mine.txt is not a file")


def test_rubrics_of_several_judges(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"rubric {name}")
    judges = [{}, *(ENDPOINT | {"name": name, "rubric_file": f"{name}.txt"} for name in ("a", "b")), ENDPOINT]
    assert [judge.rubric for judge in load(folder, judges).endpoint_judges] == ["rubric a", "rubric b", ""]
    judges[2] |= {"rubric_file": "none.txt"}
    assert load_error(folder, judges) == (
        "judge.2.rubric_file: none.txt is not a file next to the params file or in the working directory; correct the path."
    )


def test_missing_rubric(folder: Path) -> None:
    message = (
        "judge.rubric_file: texts is not a file next to the params file or in the working directory; correct the path."
    )
    assert load_error(folder, ENDPOINT | {"rubric_file": "texts"}) == message
    (folder / "texts").mkdir()
    assert load_error(folder, ENDPOINT | {"rubric_file": "texts"}) == message


def test_rubric_itself_instead_of_its_file(folder: Path) -> None:
    """Longer than a path may be."""
    text = "Prefer the response that answers the question. " * 20
    assert "is not a file" in load_error(folder, ENDPOINT | {"rubric_file": text})


@pytest.mark.parametrize("content", ["", " \n\t\n", "x" * (MAX_JUDGES_BYTES + 1)])
def test_empty_or_too_long_rubric(folder: Path, content: str) -> None:
    (folder / "rubric.txt").write_text(content)
    assert load_error(folder, ENDPOINT | {"rubric_file": "rubric.txt"}) == (
        f"judge.rubric_file: {folder / 'rubric.txt'} must have 1 to {MAX_JUDGES_BYTES:,} bytes of text."
    )


def test_huge_rubric_is_not_read(folder: Path) -> None:
    with (folder / "rubric.txt").open("wb") as file:  # sparse
        file.truncate(300 * 10**6)
    tracemalloc.start()
    try:
        assert "rubric.txt" in load_error(folder, ENDPOINT | {"rubric_file": "rubric.txt"})
        assert tracemalloc.get_traced_memory()[1] < 50 * 10**6
    finally:
        tracemalloc.stop()


def test_rubric_that_is_not_utf8(folder: Path) -> None:
    (folder / "rubric.txt").write_bytes("kürzer".encode("latin-1"))
    message = load_error(folder, ENDPOINT | {"rubric_file": "rubric.txt"})
    assert message.startswith(f"judge.rubric_file: {folder / 'rubric.txt'} cannot be read as UTF-8 text (")


def test_rubric_with_credentials_is_refused(folder: Path) -> None:
    (folder / "rubric.txt").write_text("see https://me:hunter2@example.com/guide")
    message = load_error(folder, ENDPOINT | {"rubric_file": "rubric.txt"})
    assert "judge.rubric: credentials are not allowed in settings" in message and "hunter2" not in message


# --- source of a function


def test_source_is_next_to_the_params_file_or_in_the_working_directory(home: Path, folder: Path) -> None:
    (folder / "my_judge.py").write_text(SOURCE, encoding="utf-8")
    assert source_of(load(folder, FUNCTION)) == SOURCE
    assert source_of(load(folder, [{}, FUNCTION])) == SOURCE
    (home / "my_judge.py").write_text("score = len\n")
    assert source_of(load(folder, FUNCTION)) == SOURCE
    (folder / "my_judge.py").unlink()
    assert source_of(load(folder, FUNCTION)) == "score = len\n"


def test_source_of_a_dotted_module(folder: Path) -> None:
    (folder / "mine/judges").mkdir(parents=True)
    (folder / "mine/judges/short.py").write_text(SOURCE, encoding="utf-8")
    assert source_of(load(folder, FUNCTION | {"function": "mine.judges.short:score"})) == SOURCE


@pytest.mark.parametrize("function", ["yaml:dump", "xml.dom.minidom:parseString"])
def test_installed_module_is_not_copied(folder: Path, function: str) -> None:
    assert source_of(load(folder, FUNCTION | {"function": function})) == ""


def test_file_next_to_the_params_file_hides_an_installed_module(folder: Path) -> None:
    (folder / "yaml.py").write_text(SOURCE, encoding="utf-8")
    assert source_of(load(folder, FUNCTION | {"function": "yaml:score"})) == SOURCE
    assert sys.modules["yaml"] is yaml  # nothing was imported


def test_source_in_the_params_is_kept(folder: Path) -> None:
    (folder / "my_judge.py").write_text(SOURCE, encoding="utf-8")
    assert source_of(load(folder, FUNCTION | {"source": "score = len"})) == "score = len"


def test_missing_module(folder: Path) -> None:
    reason = "next to the params file or in the working directory, nor an installed package"
    message = load_error(folder, FUNCTION)
    assert message == f"judge.function: there is neither my_judge.py {reason} my_judge; correct the name."
    message = load_error(folder, [{}, FUNCTION | {"function": "mine.b:score"}])
    assert message == f"judge.1.function: there is neither mine/b.py {reason} mine; correct the name."


def test_module_of_this_program_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A console script has the module __main__ without a spec."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert "neither __main__.py" in load_error(folder, FUNCTION | {"function": "__main__:score"})


@pytest.mark.parametrize("content", ["", "\n", "#" * (MAX_JUDGES_BYTES + 1)])
def test_empty_or_too_long_source(folder: Path, content: str) -> None:
    (folder / "my_judge.py").write_text(content)
    message = load_error(folder, FUNCTION)
    assert message.startswith("judge.function: ") and message.endswith(
        f" must have 1 to {MAX_JUDGES_BYTES:,} bytes of text."
    )


def test_source_with_a_byte_order_mark_compiles(folder: Path) -> None:
    (folder / "my_judge.py").write_text(SOURCE, encoding="utf-8-sig")
    compile(source_of(load(folder, FUNCTION)), "my_judge.py", "exec")


# --- the loaded params


BOTH = [ENDPOINT | {"rubric_file": "rubric.txt"}, FUNCTION]


@pytest.mark.parametrize(
    "rubric", ["prefer short", "prefer short\n", RUBRIC, "a\r\nb\u2028c\x0cd", "- 'x'\n- \"y\"\\n", "|\n ~"]
)
def test_dumped_params_load_without_the_files(folder: Path, tmp_path: Path, rubric: str) -> None:
    """So that a run can be resumed, and its params used again elsewhere."""
    (folder / "rubric.txt").write_text(rubric, encoding="utf-8", newline="")
    (folder / "my_judge.py").write_text(SOURCE, encoding="utf-8")
    params = load(folder, BOTH)
    for path in folder.iterdir():
        path.unlink()
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_yaml(params), encoding="utf-8")
    again = load_params(dumped)
    assert again == params and again.canonical_json() == params.canonical_json()
    assert source_of(again) == SOURCE


@pytest.mark.parametrize("character", ["x", "好", '"', "\n"])
@pytest.mark.parametrize("number", [1, 8])
def test_settings_fit_one_argument_of_a_program(folder: Path, character: str, number: int) -> None:
    """The longest texts that are accepted must reach the stage, once as settings and once inside KFP's executor input."""
    (folder / "rubric.txt").write_text("a" + character * (MAX_JUDGES_BYTES - 2) + "a", encoding="utf-8")
    judges = [ENDPOINT | {"name": f"e{n}", "rubric_file": "rubric.txt"} for n in range(number)]
    try:
        params = load(folder, judges)
    except InputError:
        return
    for stage in ("judge", "evaluation"):
        assert len(settings_of_stage(params, stage).encode()) < ONE_ARGUMENT
    assert len(dump_yaml(params).encode()) < ONE_ARGUMENT  # an argument of notify


@pytest.mark.parametrize("in_list", [False, True])
def test_secret_of_the_environment_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, in_list: bool) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    (folder / "rubric.txt").write_text(f"prefer short\nmy token is {PLANTED['HF_TOKEN']}\n")
    (folder / "my_judge.py").write_text(f"{SOURCE}TOKEN = '{PLANTED['HF_TOKEN']}'\n")
    for key, judge in (("rubric", BOTH[0]), ("source", BOTH[1])):
        message = load_error(folder, [{}, judge] if in_list else judge)
        assert message.startswith(f"{folder / 'run.yaml'}: judge")
        assert "contains the secret in the environment variable HF_TOKEN" in message and "PLANTED" not in message
        assert in_list or f"judge.{key} contains" in message


def test_secret_with_quotes_is_found_in_a_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "back\\slash 'and' \"quotes\""
    monkeypatch.setenv("MY_API_KEY", secret)
    (folder / "rubric.txt").write_text(f"the key is {secret}")
    assert "contains the secret in the environment variable MY_API_KEY" in load_error(folder, BOTH[0])
    assert "contains the secret in the environment variable MY_API_KEY" in load_error(folder, [{}, BOTH[0]])
