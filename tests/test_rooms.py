"""Import rules: a package of the library imports what its `__init__.py` says, and nothing else.

Every import counts: at the top of a file, inside functions, and under TYPE_CHECKING. The docstring of a package has the lines
`Imports:` (other packages of the library), `Packages:` (third-party packages) and, where one file may import more,
`Packages of FILE.py:`. The standard library is free unless FORBIDDEN_STDLIB names a module.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "components.rlhf"
ROOMS = sorted(path.parent.name for path in ROOT.glob("components/rlhf/*/__init__.py"))
# What the KFP definitions of the stages may import.
DEFINITIONS = ("components.container", "components.artifact_types")
PIPELINES = ("pipelines", "pipelines/commands", "pipelines/local", "pipelines/cluster")
STAGES = sorted(path.parent.name for path in ROOT.glob("components/*/__main__.py"))
# Standard library that the rules of a package forbid: files, the environment, the log.
FORBIDDEN_STDLIB = {
    "config": {"os", "pathlib", "io", "shutil", "subprocess", "logging", "tempfile"},
    "maths": {"os", "pathlib", "io", "shutil", "subprocess", "logging", "tempfile", "json", "pickle", "sys"},
}
MAY_IMPORT_OF_TRANSFORMERS = {"data": {"AutoTokenizer", "PreTrainedTokenizerBase"}}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the files of one folder may import beside the standard library and each other."""

    rooms: frozenset[str]
    packages: frozenset[str]
    packages_of_file: dict[str, frozenset[str]]  # by the file's name without .py


def rules_of(folder: str) -> Rules:
    """The import rules in the docstring of a folder's __init__.py."""
    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))) or ""

    def names(line: str) -> frozenset[str]:
        return frozenset(line.split(", ")) - {"none"}

    found = {key: names(value) for key, value in re.findall(r"^(Imports|Packages): (.+)\.$", text, re.MULTILINE)}
    own = re.findall(r"^Packages of (\w+)\.py: (.+)\.$", text, re.MULTILINE)
    assert set(found) == {"Imports", "Packages"}, f"{folder}/__init__.py does not state its import rules"
    return Rules(
        rooms=found["Imports"], packages=found["Packages"], packages_of_file={file: names(line) for file, line in own}
    )


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


def test_walk_sees_every_kind_of_import() -> None:
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


def test_package_imports_only_what_its_docstring_names() -> None:
    for room in ROOMS:
        rules = rules_of(f"components/rlhf/{room}")
        assert rules.rooms <= set(ROOMS) - {room}, f"{room} names a package that does not exist"
        for path in files(f"components/rlhf/{room}/*.py"):
            check_imports(path, rules, own=f"{LIBRARY}.{room}")
            names = imports(path)
            stdlib = {package_of(name) for name in names} & FORBIDDEN_STDLIB.get(room, set())
            assert not stdlib, f"{path.relative_to(ROOT)} imports {stdlib}"
            of_transformers = {name.split(".")[1] for name in names if within(name, "transformers")}
            more = of_transformers - MAY_IMPORT_OF_TRANSFORMERS.get(room, of_transformers)
            assert not more, f"{path.relative_to(ROOT)} imports {more} of transformers"


def check_imports(path: Path, rules: Rules, *, own: str, more: tuple[str, ...] = ()) -> None:
    """Fail unless a file imports what the rules allow, modules below `own`, and the modules `more`."""
    allowed = [own, *more, *(f"{LIBRARY}.{room}" for room in rules.rooms)]
    names = imports(path)
    ours = [name for name in names if package_of(name) in ("components", "pipelines", "tests")]
    strangers = [name for name in ours if not any(within(name, module) for module in allowed)]
    assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"
    packages = third_party(names) - rules.packages - rules.packages_of_file.get(path.stem, frozenset())
    assert not packages, f"{path.relative_to(ROOT)} imports {packages}"


def test_rules_name_nothing_that_is_not_imported() -> None:
    folders = [f"components/rlhf/{room}" for room in ROOMS] + list(PIPELINES)
    for folder in folders:
        rules = rules_of(folder)
        by_file = {path.stem: imports(path) for path in files(f"{folder}/*.py")}
        rooms = {name.split(".")[2] for names in by_file.values() for name in names if within(name, LIBRARY)}
        assert rules.rooms <= rooms, f"{folder} does not import {rules.rooms - rooms}"
        packages = {name for names in by_file.values() for name in third_party(names)}
        assert rules.packages <= packages, f"{folder} does not import {rules.packages - packages}"
        for file, allowed in rules.packages_of_file.items():
            assert allowed <= third_party(by_file[file]), f"{folder}/{file}.py does not import {allowed}"


def test_packages_import_each_other_without_a_circle() -> None:
    below = {room: rules_of(f"components/rlhf/{room}").rooms for room in ROOMS}
    while free := [room for room, rooms in below.items() if not rooms & below.keys()]:
        for room in free:
            del below[room]
    assert not below, f"a circle of imports among {sorted(below)}"


def test_library_has_no_file_outside_its_packages() -> None:
    assert [path.name for path in files("components/rlhf/*.py")] == ["__init__.py"]


def test_maths_has_no_modules_process_groups_files_or_prints() -> None:
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


def test_config_reads_no_file() -> None:
    for path in files("components/rlhf/config/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"open", "print", "input"}, path.name


@pytest.mark.parametrize("stage", STAGES)
def test_stage_imports_only_the_library_and_itself(stage: str) -> None:
    allowed = (LIBRARY, f"components.{stage}", *DEFINITIONS)
    for path in files(f"components/{stage}/**/*.py"):
        names = [name for name in imports(path) if package_of(name) in ("components", "pipelines", "tests")]
        others = [name for name in names if not (any(within(name, m) for m in allowed))]
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


def test_only_component_definitions_and_pipelines_import_kfp() -> None:
    for path in files("components/**/*.py"):
        if path.name not in ("component.py", "container.py", "artifact_types.py"):
            assert not {"kfp", "google"} & third_party(imports(path)), path.relative_to(ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_component_definition_imports_only_kfp_and_the_modules_of_definitions(stage: str) -> None:
    names = imports(ROOT / "components" / stage / "component.py")
    assert third_party(names) == {"kfp"}
    assert all(any(within(name, module) for module in DEFINITIONS) for name in names if within(name, "components"))


def test_pipelines_import_component_definitions_and_what_their_docstring_names() -> None:
    definitions = (*(f"components.{stage}.component" for stage in STAGES), "components.artifact_types")
    for folder in PIPELINES:
        for path in files(f"{folder}/*.py"):
            check_imports(path, rules_of(folder), own="pipelines", more=definitions)


def test_package_init_holds_at_most_a_docstring() -> None:
    """Only so does a stage need no kfp, and a component definition no torch."""
    for path in [*files("components/**/__init__.py"), *files("pipelines/**/__init__.py")]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        is_docstring = [isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body]
        assert is_docstring in ([], [True]), path.relative_to(ROOT)
    for path in [*files("components/**/*.py"), *files("pipelines/**/*.py")]:
        assert (path.parent / "__init__.py").is_file(), path.relative_to(ROOT)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_program_is_shorter_than_80_lines(stage: str) -> None:
    assert len((ROOT / "components" / stage / "__main__.py").read_text(encoding="utf-8").splitlines()) < 80


def test_no_file_is_called_utils() -> None:
    names = {path.stem for path in [*files("components/**/*.py"), *files("pipelines/**/*.py")]}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


# --- in fresh processes: what is loaded, whoever imports it ---


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_compiling_and_submitting_load_no_torch() -> None:
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "transformers", "sklearn", "datasets"} & set(sys.modules)
    assert not heavy, f"{name} loads {heavy}"
"""
    modules = [f"components.{stage}.component" for stage in STAGES]
    modules += [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in files("pipelines/**/*.py")
        if path.stem != "__init__"
    ]
    done = run(code, *modules)
    assert done.returncode == 0, done.stderr


def test_stage_starts_without_kfp_and_shows_its_options_without_torch() -> None:
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
