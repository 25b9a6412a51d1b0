"""No source file outside of tests uses a function that can execute code from data."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path
    for folder in ("components", "pipelines", "benchmarks", "images", ".ci")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.jit.load", "numpy.load", "np.load", "yaml.load",
         "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle", "importlib.reload"}  # fmt: skip
TRUE = {"trust_remote_code", "shell", "allow_pickle"}  # arguments that must be False
FALSE = {"weights_only", "verify"}  # arguments that must not be False


def unsafe_uses(source: str) -> Iterator[str]:
    """The unsafe imports, calls and arguments in the source of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            yield f"imports from {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in CALLS and not (name == "torch.load" and arguments.get("weights_only") == "True"):
                yield f"calls {name}"
            yield from (
                f"passes {key}={arguments[key]}" for key in sorted(TRUE & arguments.keys()) if arguments[key] != "False"
            )
            yield from (f"passes {key}=False" for key in sorted(FALSE & arguments.keys()) if arguments[key] == "False")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["imports pickle"]),
        ("def f():\n    from joblib import load", ["imports from joblib"]),
        ("torch.load(path)", ["calls torch.load"]),
        ("torch.load(path, weights_only=False)", ["calls torch.load", "passes weights_only=False"]),
        ("torch.load(path, weights_only=True)", []),
        ("load(x, trust_remote_code=setting)", ["passes trust_remote_code=setting"]),
        ("load(x, trust_remote_code=False)", []),
        ("subprocess.run(x, shell=True)", ["passes shell=True"]),
        ("yaml.load(x, Loader=yaml.Loader)", ["calls yaml.load"]),
        ("yaml.safe_load(x); re.compile(y)", []),
        ("eval(x)", ["calls eval"]),
    ],
)
def test_unsafe_uses_are_found(source: str, found: list[str]) -> None:
    assert list(unsafe_uses(source)) == found


def test_no_file_has_an_unsafe_use() -> None:
    assert len(FILES) > 100
    found = {str(path.relative_to(ROOT)): list(unsafe_uses(path.read_text(encoding="utf-8"))) for path in FILES}
    assert {path: uses for path, uses in found.items() if uses} == {}


def test_every_from_pretrained_call_sets_trust_remote_code() -> None:
    """The default of transformers asks on a terminal, and fails with an unhelpful error where there is none."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"Auto\w+\.from_(pretrained|config)", ast.unparse(node.func)
            ):
                arguments = {keyword.arg for keyword in node.keywords}
                assert "trust_remote_code" in arguments, f"{path.relative_to(ROOT)}:{node.lineno}"
