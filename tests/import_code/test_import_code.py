"""The stage import_code: an archive in the settings, a folder and a folder in S3 give the same artifact."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.artifacts.code import pack_code
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "mine"
    (source / "package").mkdir(parents=True)
    (source / "mine.py").write_text("import package\n")
    (source / "package" / "__init__.py").write_text("")
    (source / ".env").write_text("KEY=1")
    return source


def run_stage(target: Path, **code: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "components.import_code", "--settings", json.dumps({"code": code})]
    command += ["--code", str(target), "--tracking", '{"enabled": false}']
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)


def imported(target: Path, **code: Any) -> Manifest:
    result = run_stage(target, **code)
    assert result.returncode == 0, result.stderr
    return open_artifact(target, "code")


def test_archive_and_folder_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    first = imported(tmp_path / "a", archive=pack_code(folder))
    second = imported(tmp_path / "b", path=str(folder))
    assert set(first.files) == {"mine.py", "package/__init__.py"}
    assert first.files == second.files


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ({}, "error: code.path is missing; set it to the folder of your functions."),
        ({"path": "nowhere"}, "error: nowhere is not a folder; set code.path to the folder of your Python modules."),
        ({"archive": "x"}, "error: code.archive is not an archive of code"),
    ],
)
def test_failure_is_one_line_and_leaves_nothing(code: dict[str, str], message: str, tmp_path: Path) -> None:
    result = run_stage(tmp_path / "a", **code)
    assert result.returncode == 1
    assert next(line for line in result.stderr.splitlines() if line.startswith("error:")).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_stage_imports_no_torch() -> None:
    code = "import sys, components.import_code.__main__, components.rlhf.artifacts.code; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
