"""Whether an image can do its work: `python selftest.py trainer|rollout|tools`, run inside it as the last step of its build.

Every stage of the image shows its options, every module that a stage can reach is imported, everything installed has the version that
constraints.txt says, and kfp is not there. Ends with 1 and one sentence at the first thing that is wrong.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ALL = ("import_model", "prepare_data", "sft", "reward_model", "judge", "ppo", "evaluation", "register", "notify")
STAGES = {"tools": ("register", "notify"), "trainer": ALL, "rollout": ALL}
# Starting several processes; a stage of the tools image never does.
NEEDS_TORCH = ("components.rlhf.runtime.launcher",)
FORBIDDEN = {"tools": ("kfp", "torch", "transformers"), "trainer": ("kfp", "vllm"), "rollout": ("kfp",)}
REQUIRED = {"rollout": ("vllm",)}


def source_of(module: str) -> Path | None:
    """The file of one of our modules; None for a package or a name in a module."""
    for folder in sys.path:
        path = Path(folder or ".") / (module.replace(".", "/") + ".py")
        if path.is_file():
            return path
    return None


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything of ours that a source imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [node.module, *(f"{node.module}.{a.name}" for a in node.names)] if isinstance(node, ast.ImportFrom) else []
        )
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in names if name and name.startswith("components."))


def reachable(stage: str) -> list[str]:
    """Every module of ours that a stage can come to import."""
    found, waiting = set(), [f"components.{stage}.__main__"]
    while waiting:
        module = waiting.pop()
        path = source_of(module)
        if path and module not in found:
            found.add(module)
            waiting += imported(path)
    return sorted(found)


def stages(image: str) -> list[str]:
    return [stage for stage in STAGES[image] if source_of(f"components.{stage}.__main__")]


def wrong_versions(constraints: Path) -> list[str]:
    """Installed packages that constraints.txt has otherwise or not at all; a build tag such as +cpu is no difference."""
    lines = [line for line in constraints.read_text(encoding="utf-8").splitlines() if "==" in line]
    pins = dict(line.split("==", 1) for line in lines)
    wrong = []
    for package in importlib.metadata.distributions():
        name, version = (
            package.metadata["Name"].lower().replace("_", "-").replace(".", "-"),
            package.version.split("+")[0],
        )
        if name != "kfp-rlhf" and pins.get(name, "").split("+")[0] != version:
            wrong.append(f"{name}=={version} (constraints.txt: {pins.get(name, 'nothing')})")
    return wrong


def main(image: str) -> None:
    for stage in stages(image):
        done = subprocess.run([sys.executable, "-m", f"components.{stage}", "--help"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{image}: python -m components.{stage} --help ends with {done.returncode}: {done.stderr[-2000:]}")
    modules = sorted({module for stage in stages(image) for module in reachable(stage)})
    for module in modules:
        if image == "tools" and module in NEEDS_TORCH:
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            sys.exit(f"{image}: {module} cannot be imported: {error}")
    for package in REQUIRED.get(image, ()):
        if not importlib.util.find_spec(package):
            sys.exit(f"{image}: {package} is missing")
    for package in FORBIDDEN[image]:
        if importlib.util.find_spec(package):
            sys.exit(f"{image}: {package} has no place here, and is installed")
    wrong = wrong_versions(Path(__file__).with_name("constraints.txt"))
    if wrong:
        sys.exit(f"{image}: other versions than constraints.txt: {', '.join(wrong)}")
    print(
        f"{image}: {len(stages(image))} stages show their options, {len(modules)} modules can be imported, versions are as pinned"
    )


if __name__ == "__main__":
    main(sys.argv[1])
