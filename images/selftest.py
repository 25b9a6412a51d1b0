"""Self-test of an image, run inside it as the last step of its build: `python selftest.py trainer|rollout|tools`.

Every stage of the image shows its --help, every module that a stage can import is imported, installed versions are those of
constraints.txt, and kfp is not installed. The first problem ends it with exit code 1 and one sentence.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ALL_STAGES = (
    "import_model",
    "prepare_data",
    "sft",
    "reward_model",
    "judge",
    "ppo",
    "dpo",
    "checks",
    "evaluation",
    "register",
    "notify",
)
# The tasks of sft, reward_model, ppo and dpo may run in the tools image, to launch these stages as TrainJobs.
STAGES = {
    "tools": ("register", "notify", "sft", "reward_model", "ppo", "dpo"),
    "trainer": ALL_STAGES,
    "rollout": ALL_STAGES,
}
# What only training stages use, and what they import with it; the stages of the tools image have no torch.
TRAINING = (
    "components.rlhf.checkpoints.manager",
    "components.rlhf.engine.group",
    "components.rlhf.engine.protocol",
    "components.rlhf.runtime.agreement",
    "components.rlhf.runtime.launcher",
    "components.rlhf.runtime.planned",
    "components.rlhf.runtime.training",
)
# What only such tasks use; the images of the stages have no kubernetes.
LAUNCHING = ("components.rlhf.trainjob.api", "components.rlhf.trainjob.jobs", "components.rlhf.trainjob.launch")
LAUNCHED = ("sft", "reward_model", "ppo", "dpo")
FORBIDDEN = {"tools": ("kfp", "torch", "transformers"), "trainer": ("kfp", "vllm"), "rollout": ("kfp",)}
REQUIRED = {"rollout": ("vllm",)}
LOAD = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1])"


def source_of(module: str) -> Path | None:
    """The file of a module of components; None for a package or a name in a module."""
    for folder in sys.path:
        path = Path(folder or ".") / (module.replace(".", "/") + ".py")
        if path.is_file():
            return path
    return None


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a file imports from components, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [node.module, *(f"{node.module}.{a.name}" for a in node.names)] if isinstance(node, ast.ImportFrom) else []
        )
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in names if name and name.startswith("components."))


def reachable_modules(stage: str, excluded: tuple[str, ...] = ()) -> list[str]:
    """Every module of components that a stage can import, without those that are reached only through an excluded one."""
    found, pending = set(), [f"components.{stage}.__main__"]
    while pending:
        module = pending.pop()
        path = source_of(module)
        if path and module not in found and module not in excluded:
            found.add(module)
            pending += imports_of(path)
    return sorted(found)


def stages(image: str) -> list[str]:
    return [stage for stage in STAGES[image] if source_of(f"components.{stage}.__main__")]


def modules_of(image: str) -> list[str]:
    """Every module that the stages of an image can import there."""
    excluded = TRAINING if image == "tools" else LAUNCHING
    whole = [stage for stage in stages(image) if image != "tools" or stage not in LAUNCHED]
    return sorted({module for stage in whole for module in reachable_modules(stage, excluded)})


def unpinned_packages(constraints: Path) -> list[str]:
    """Installed packages whose version is not that of constraints.txt, ignoring local versions such as +cpu."""
    lines = [line for line in constraints.read_text(encoding="utf-8").splitlines() if "==" in line]
    pins = dict(line.split("==", 1) for line in lines)
    unpinned = []
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        version = package.version.split("+")[0]
        if name != "kfp-rlhf" and pins.get(name, "").split("+")[0] != version:
            unpinned.append(f"{name}=={version} (constraints.txt: {pins.get(name, 'nothing')})")
    return unpinned


def unloadable_kernels() -> list[str]:
    """Compiled parts of vLLM that cannot be loaded, in an image for CPUs; those for GPUs need a driver. vLLM itself ignores them."""
    import torch

    if torch.version.cuda or not importlib.util.find_spec("vllm"):
        return []
    errors = []
    for path in sorted(Path(str(importlib.util.find_spec("vllm").origin)).parent.glob("*.so")):
        # Each in a process of its own: the builds for several kinds of CPU register the same operators.
        done = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True)
        if done.returncode:
            errors.append((done.stderr.splitlines() or [path.name])[-1])
    return errors


def main(image: str) -> None:
    for stage in stages(image):
        result = subprocess.run([sys.executable, "-m", f"components.{stage}", "--help"], capture_output=True, text=True)
        if result.returncode:
            sys.exit(
                f"{image}: python -m components.{stage} --help failed with {result.returncode}: {result.stderr[-2000:]}"
            )
    modules = modules_of(image)
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            sys.exit(f"{image}: {module} cannot be imported: {error}")
    for package in REQUIRED.get(image, ()):
        if not importlib.util.find_spec(package):
            sys.exit(f"{image}: {package} is not installed")
    if image == "rollout" and (errors := unloadable_kernels()):
        sys.exit(f"{image}: kernels of vLLM cannot be loaded: {'; '.join(errors)}")
    for package in FORBIDDEN[image]:
        if importlib.util.find_spec(package):
            sys.exit(f"{image}: {package} must not be installed")
    unpinned = unpinned_packages(Path(__file__).with_name("constraints.txt"))
    if unpinned:
        sys.exit(f"{image}: versions differ from constraints.txt: {', '.join(unpinned)}")
    print(
        f"{image}: {len(stages(image))} stages show --help, {len(modules)} modules can be imported, all versions are pinned"
    )


if __name__ == "__main__":
    main(sys.argv[1])
