"""Write requirements.txt and constraints.txt of every image from pyproject.toml and the root's constraints.txt.

    python images/lock.py      needs uv and the package index; `make setup` puts uv into .venv

Versions are the root's, the ones that the tests run with. What only a GPU build has (CUDA libraries, Triton, vLLM with what it pins
itself) is resolved against them. tests/images/test_locks.py says when a file is stale.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ("tools", "trainer", "rollout")
# Compiling and submitting happen elsewhere; kfp's own pins have no say over the libraries of training.
NOT_IN_IMAGES = ("kfp", "kfp-kubernetes")
# What the stages of the tools image import; versions come from pyproject.toml.
TOOLS = ("boto3", "click", "mlflow", "pydantic", "rich")
# mlflow's client alone is a third of its size. It speaks to servers; a sqlite:/// address needs the whole package.
TOOLS_INSTEAD = {"mlflow": "mlflow-skinny"}
HEADER = "# Made by images/lock.py; do not edit.\n"
# Stages of the trainer image fetch sources that begin with pypi: through it.
ALSO_TRAINING = ("pip",)
PYTHON = "3.11"


def name_of(requirement: str) -> str:
    """The distribution that a requirement asks for: `torch>=2.9` -> `torch`."""
    for end, char in enumerate(requirement):
        if not (char.isalnum() or char in "-_."):
            return requirement[:end].lower().replace("_", "-")
    return requirement.lower().replace("_", "-")


def requirements(image: str) -> list[str]:
    """What an image asks for by name, in the ranges of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = [line for line in project["dependencies"] if name_of(line) not in NOT_IN_IMAGES]
    if image == "tools":
        names = {line: name_of(line) for line in base if name_of(line) in TOOLS}
        return [TOOLS_INSTEAD.get(name, name) + line[len(name) :] for line, name in names.items()]
    return base + [*ALSO_TRAINING] + (project["optional-dependencies"]["gpu"] if image == "rollout" else [])


def pins(path: Path) -> dict[str, str]:
    """{distribution: version} of a constraints file."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def resolve(image: str, against: Path) -> str:
    """Every package of the image on Linux x86_64 with CUDA, one pin a line."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requirements.txt"
        asked.write_text("\n".join(requirements(image)) + "\n", encoding="utf-8")
        command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", PYTHON]
        command += ["--python-platform", "x86_64-manylinux_2_28", "--no-config", "--constraint", str(against)]
        command += ["--override", str(ROOT / "overrides.txt"), str(asked)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{image} has no resolution against {against.relative_to(ROOT)}:\n{done.stderr.strip()}")
    return done.stdout


def main() -> None:
    for image in IMAGES:
        folder = ROOT / "images" / image
        # vLLM pins some packages otherwise than the root's build for CPUs; it keeps to the trainer's versions alone.
        against = ROOT / "images/trainer/constraints.txt" if image == "rollout" else ROOT / "constraints.txt"
        resolved = resolve(image, against)
        (folder / "constraints.txt").write_text(HEADER + resolved, encoding="utf-8")
        (folder / "requirements.txt").write_text(HEADER + "\n".join(requirements(image)) + "\n", encoding="utf-8")
        print(f"images/{image}: {len(requirements(image))} requirements, {len(resolved.splitlines())} pins")


if __name__ == "__main__":
    main()
