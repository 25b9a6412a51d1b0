"""`kfp-rlhf init`: every combination of answers gives a params file that loads, or one sentence and no file."""

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.compile import compile_pipeline
from pipelines.settings import load_params
from pipelines.starter import MOVIES, PROFILES, Answers, write_starter

ROWS = {
    "demonstrations": {"prompt": "What is 'RLHF'?", "completion": "Learning from people."},
    "preferences": {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
    "prompts": {"prompt": "Why is the sky blue? " * 9},
}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Files in a folder whose name needs quoting in YAML and in a shell."""
    folder = tmp_path / "my: 'data' #1"
    folder.mkdir()
    for name, row in ROWS.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return {name: str(folder / f"{name}.jsonl") for name in ROWS}


def invoke(*arguments: object, answers: str = "") -> Result:
    return CliRunner().invoke(cli, ["init", *map(str, arguments)], input=answers)


@pytest.mark.parametrize(("size", "own", "packaged"), list(itertools.product(PROFILES, (False, True), (False, True))))
def test_every_answer_gives_a_params_file(
    tmp_path: Path, data: dict[str, str], size: str, own: bool, packaged: bool
) -> None:
    given = (data if own else {}) | ({} if packaged else {"model": "org/model"})
    target = tmp_path / "my.yaml"
    written = write_starter(Answers(size=size, prompt_tokens=100, response_tokens=50, **given), target)  # type: ignore[arg-type]
    params = load_params(target)
    assert params == written and params.preset == "my"
    assert params.data.prompts.path == (data["prompts"] if own else "pypi:vaderSentiment==3.3.2")
    assert (params.data.max_prompt_tokens, params.data.max_tokens) == (100, 150)
    assert params.ppo.rollout.sampling.max_new_tokens == 50
    assert params.cluster.stages.get("ppo", "") == PROFILES[size]
    assert params.ppo.training.num_processes == {"cpu": 1, "1gpu": 1, "8gpu": 8}[size]
    assert (params.model.num_frozen_layers > 0) == (packaged and size == "cpu")
    if not own:
        compile_pipeline(params, tmp_path / "pipeline.yaml")


def test_questions_are_asked_and_the_first_rows_are_shown(tmp_path: Path, data: dict[str, str]) -> None:
    target = tmp_path / "it's mine.yaml"
    lines = ["org/model", data["demonstrations"], data["preferences"], data["prompts"], "1gpu", "", "256"]
    result = invoke("--out", target, answers="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    assert "  What is 'RLHF'? -> Learning from people." in result.output
    assert "  Hi -> Hello! -> What?" in result.output
    assert "Why is the sky blue? Why is the sky blue?" in result.output and "…" in result.output
    assert """it'"'"'s mine.yaml'""" in result.output
    params = load_params(target)
    assert (params.data.max_prompt_tokens, params.ppo.rollout.sampling.max_new_tokens) == (512, 256)
    assert params.ppo.rollout.engine == "vllm"


def test_defaults_are_the_movie_task(tmp_path: Path) -> None:
    assert invoke("--yes", "--out", tmp_path / "my.yaml").exit_code == 0
    params = load_params(tmp_path / "my.yaml")
    assert params.data.prompts.format == "movie_ratings" and params.data.max_tokens == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": MOVIES}, "give all three sources, or none"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"prompt_tokens": 2**60}, "max_prompt_tokens"),
        ({"demonstrations": "PAIRS"}, "data.demonstrations"),
    ],
)
def test_answers_that_cannot_run_write_nothing(
    tmp_path: Path, data: dict[str, str], change: dict[str, object], message: str
) -> None:
    if change.get("demonstrations") == "PAIRS":
        change = {"demonstrations": data["prompts"]}
    target = tmp_path / "my.yaml"
    with pytest.raises(InputError, match=message):
        write_starter(Answers(**(data | change)), target)  # type: ignore[arg-type]
    assert not target.exists()


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("mine")
    for arguments in (["--yes"], []):  # nothing is asked in vain
        result = invoke(*arguments, "--out", tmp_path / "my.yaml")
        assert isinstance(result.exception, InputError) and result.output == ""
        assert (tmp_path / "my.yaml").read_text() == "mine"
