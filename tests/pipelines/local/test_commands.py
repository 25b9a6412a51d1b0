"""The commands that a run prints do what they say in a shell, whatever the run directory is called."""

import shlex
import subprocess
from pathlib import Path

import pytest

from components.rlhf.tracking.texts import database_uri
from pipelines.local.summary import _commands

AWKWARD = ["it's a run", 'say "x"', "$HOME", "`id`", "a;b", "a&b", "a b", "-x", "back\\slash", "%25", "ä", "a\nb"]


@pytest.mark.parametrize("name", AWKWARD)
def test_printed_commands_survive_a_shell(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    paths = {"run": str(folder), "report": str(folder / "report.html"), "model": str(folder / "model")}
    uri = database_uri(folder / "mlflow.db")
    for key, command in _commands(paths, uri).items():
        words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {command}"]).decode().split("\0")[:-1]
        assert words == shlex.split(command)
        if key == "report":
            assert words[1] == paths["report"]
        if key == "model":  # the Python code names the folder
            code = compile(words[2], "command", "exec")
            assert paths["model"] in code.co_consts
        if key == "tracking":
            assert words[-2:] == ["ui", paths["run"]]
