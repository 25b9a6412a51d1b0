"""The laws of the rooms, kept by reading every import there is: at the top, inside functions, and under TYPE_CHECKING.

The table below is the design's. Whoever wants to change a line changes the design first.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "components.rlhf"


@dataclass(frozen=True, kw_only=True)
class Law:
    """What one room may import beside the standard library, itself, and the one exception type."""

    rooms: frozenset[str] = frozenset()  # a room, or one module of it
    packages: frozenset[str] = frozenset()
    own_file: dict[str, frozenset[str]] = field(default_factory=dict)  # file -> packages that it alone may import


def law(rooms: str = "", packages: str = "", **own_file: str) -> Law:
    return Law(
        rooms=frozenset(rooms.split()),
        packages=frozenset(packages.split()),
        own_file={name: frozenset(allowed.split()) for name, allowed in own_file.items()},
    )


ROOMS = {
    "config": law(packages="pydantic"),
    "artifacts": law("config.strict_json", "safetensors"),
    "data": law("config maths", "transformers torch datasets pyarrow"),
    "maths": law(packages="torch"),
    "models": law("config data maths", "torch transformers peft accelerate", lora="safetensors"),
    "rewards": law("config data models", "torch transformers httpx", linear="sklearn numpy safetensors"),
    "rollout": law("config data models", "torch transformers", vllm="vllm"),
    "engine": law("config", "torch safetensors", deepspeed="deepspeed"),
    "checkpoints": law(
        "config artifacts engine.protocol engine.group edges.storage edges.process",
        files="torch safetensors",
        folder="safetensors",
    ),
    "edges": law("config artifacts", "pydantic mlflow boto3 botocore click rich", launcher="torch"),
}
STAGES = sorted(path.parent.name for path in ROOT.glob("components/*/__main__.py"))
# Standard library that would break a room's law: files, the environment, the log.
FORBIDDEN_STDLIB = {
    "config": {"os", "pathlib", "io", "shutil", "subprocess", "logging", "tempfile"},
    "maths": {"os", "pathlib", "io", "shutil", "subprocess", "logging", "tempfile", "json", "pickle", "sys"},
}
TALKS_TO_A_CLUSTER = {"server", "versions", "submit", "kube"}
MAY_IMPORT_OF_TRANSFORMERS = {"data": {"AutoTokenizer", "PreTrainedTokenizerBase"}}


def files(pattern: str) -> list[Path]:
    found = sorted(ROOT.glob(pattern))
    assert found, pattern
    return found


def imports_of(source: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a source: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: the path on disk is the import path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> list[str]:
    return list(imports_of(path.read_text(encoding="utf-8")))


def package_of(name: str) -> str:
    return name.split(".")[0]


def third_party(names: list[str]) -> set[str]:
    ours = {"components", "pipelines", "tests"}
    return {package_of(name) for name in names} - sys.stdlib_module_names - ours


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_the_walk_sees_every_kind_of_import() -> None:
    source = """
import os.path
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
def f():
    import torch
    class A:
        from components.rlhf import maths
"""
    assert sorted(imports_of(source)) == [
        "components.rlhf.maths",
        "os.path",
        "torch",
        "transformers.PreTrainedTokenizerBase",
        "typing.TYPE_CHECKING",
    ]


def test_the_table_names_the_rooms_that_there_are() -> None:
    folders = {path.parent.name for path in files("components/rlhf/*/__init__.py")}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_law_names(room: str) -> None:
    allowed = [LIBRARY + ".errors", *(f"{LIBRARY}.{name}" for name in {room, *ROOMS[room].rooms})]
    for path in files(f"components/rlhf/{room}/**/*.py"):
        names = imports(path)
        ours = [name for name in names if package_of(name) in ("components", "pipelines", "tests")]
        strangers = [name for name in ours if not any(within(name, module) for module in allowed)]
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"
        packages = third_party(names) - ROOMS[room].packages - ROOMS[room].own_file.get(path.stem, frozenset())
        assert not packages, f"{path.relative_to(ROOT)} imports {packages}"
        stdlib = {package_of(name) for name in names} & FORBIDDEN_STDLIB.get(room, set())
        assert not stdlib, f"{path.relative_to(ROOT)} imports {stdlib}"
        of_transformers = {name.split(".")[1] for name in names if within(name, "transformers")}
        more = of_transformers - MAY_IMPORT_OF_TRANSFORMERS.get(room, of_transformers)
        assert not more, f"{path.relative_to(ROOT)} imports {more} of transformers"


def test_what_every_room_shares_is_one_file_of_plain_python() -> None:
    shared = [path.name for path in files("components/rlhf/*.py")]
    assert shared == ["__init__.py", "errors.py"]
    names = imports(ROOT / "components/rlhf/errors.py")
    assert {package_of(name) for name in names} <= sys.stdlib_module_names


def test_the_maths_knows_functions_alone() -> None:
    """No modules, no process groups, no files and no prints: tensors in, tensors out."""
    for path in files("components/rlhf/maths/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(imports(path))
        for name in dotted:
            parts = name.split(".")
            assert "distributed" not in parts, f"{path.name}: {name}"
            if "nn" in parts:
                after = parts[parts.index("nn") + 1 :]
                assert after[:1] in ([], ["functional"]), f"{path.name}: {name}"
        assert "torch.nn" not in imports(path), f"{path.name} imports the modules of torch"
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"open", "print", "input"}, path.name


def test_settings_read_no_file() -> None:
    for path in files("components/rlhf/config/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"open", "print", "input"}, path.name


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_rooms_and_itself(stage: str) -> None:
    for path in files(f"components/{stage}/**/*.py"):
        names = [name for name in imports(path) if package_of(name) in ("components", "pipelines", "tests")]
        others = [name for name in names if not (within(name, LIBRARY) or within(name, f"components.{stage}"))]
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


def test_kfp_is_imported_by_definitions_and_pipelines_alone() -> None:
    for path in files("components/**/*.py"):
        if path.name != "component.py":
            assert not {"kfp", "google"} & third_party(imports(path)), path.relative_to(ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_a_definition_imports_kfp_alone(stage: str) -> None:
    names = imports(ROOT / "components" / stage / "component.py")
    assert third_party(names) == {"kfp"}
    assert not [name for name in names if within(name, "components")]


def test_pipelines_import_definitions_settings_and_edges() -> None:
    allowed = [
        "pipelines",
        *(f"{LIBRARY}.{name}" for name in ("artifacts", "config", "edges", "errors")),
        "components.evaluation.table",
    ]
    allowed += [f"components.{stage}.component" for stage in STAGES]
    # What looks at data before a run starts: the readers, which need no torch (test_compiling_needs_no_torch holds them to it).
    allowed += [f"{LIBRARY}.data.{name}" for name in ("sources", "forms", "clean")]
    for path in files("pipelines/*.py"):
        names = imports(path)
        ours = [name for name in names if package_of(name) in ("components", "pipelines", "tests")]
        strangers = [name for name in ours if not any(within(name, module) for module in allowed)]
        assert not strangers, f"{path.name} imports {strangers}"
        allowed_packages = {"kfp", "yaml", "pydantic", "pydantic_core", "click", "rich"}
        if path.stem in TALKS_TO_A_CLUSTER:
            allowed_packages |= {"kfp_server_api", "urllib3", "certifi", "kubernetes"}  # what kfp itself talks with
        strangers = sorted(third_party(names) - allowed_packages)
        assert not strangers, f"{path.name} imports {strangers}"


def test_packages_are_empty() -> None:
    """Only so does a stage need no kfp, and a definition no torch."""
    for path in [*files("components/**/__init__.py"), *files("pipelines/**/__init__.py")]:
        assert path.read_bytes() == b"", path.relative_to(ROOT)
    for path in [*files("components/**/*.py"), *files("pipelines/**/*.py")]:
        assert (path.parent / "__init__.py").is_file(), path.relative_to(ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_a_program_reads_as_prose(stage: str) -> None:
    assert len((ROOT / "components" / stage / "__main__.py").read_text(encoding="utf-8").splitlines()) < 80


def test_no_file_is_a_drawer_for_everything() -> None:
    names = {path.stem for path in [*files("components/**/*.py"), *files("pipelines/**/*.py")]}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


# --- in fresh processes: what is loaded, whoever imports it ---


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_compiling_needs_no_torch() -> None:
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "transformers", "sklearn", "datasets"} & set(sys.modules)
    assert not heavy, f"{name} loads {heavy}"
"""
    modules = [f"components.{stage}.component" for stage in STAGES]
    modules += [f"pipelines.{path.stem}" for path in files("pipelines/*.py") if path.stem != "__init__"]
    done = run(code, *modules)
    assert done.returncode == 0, done.stderr


def test_a_stage_starts_without_kfp_and_shows_its_options_without_torch() -> None:
    code = """
import importlib.abc, runpy, sys
class NoKfp(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kfp":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoKfp())
for stage in sys.argv[1:]:
    sys.argv = [stage, "--help"]
    try:
        runpy.run_module(f"components.{stage}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{stage} ends with {end.code}"
    heavy = {"torch", "transformers", "mlflow", "kfp"} & set(sys.modules)
    assert not heavy, f"{stage} loads {heavy}"
"""
    done = run(code, *STAGES)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert f"Usage: python -m components.{stage} [OPTIONS]" in done.stdout
