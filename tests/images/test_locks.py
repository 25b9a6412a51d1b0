"""The files that images are built from are fresh and clean; nothing here needs a network or a container."""

import subprocess
import sys
from pathlib import Path

import pytest

from images.lock import HEADER, IMAGES, NOT_IN_IMAGES, name_of, pins, requirements

ROOT = Path(__file__).resolve().parents[2]
STALE = "is stale; run python images/lock.py"


@pytest.mark.parametrize(("requirement", "name"), [("torch>=2.9", "torch"), ("A_b[c]==1", "a-b"), ("pip", "pip")])
def test_package_name_of_a_requirement(requirement: str, name: str) -> None:
    assert name_of(requirement) == name


@pytest.mark.parametrize("image", IMAGES)
def test_requirements_match_the_project(image: str) -> None:
    text = (ROOT / "images" / image / "requirements.txt").read_text(encoding="utf-8")
    assert text == HEADER + "\n".join(requirements(image)) + "\n", f"images/{image}/requirements.txt {STALE}"


@pytest.mark.parametrize("image", IMAGES)
def test_every_requirement_is_pinned_and_kfp_is_excluded(image: str) -> None:
    pinned = pins(ROOT / "images" / image / "constraints.txt")
    missing = {name_of(line) for line in requirements(image)} - set(pinned)
    assert not missing, f"images/{image}/constraints.txt {STALE}: {missing}"
    assert not {*NOT_IN_IMAGES, "kfp-pipeline-spec", "kfp-server-api"} & set(pinned)
    assert ("torch" in pinned) == (image != "tools") and ("vllm" in pinned) == (image == "rollout")


@pytest.mark.parametrize(
    ("image", "against"),
    [("tools", "constraints.txt"), ("trainer", "constraints.txt"), ("rollout", "images/trainer/constraints.txt")],
)
def test_pinned_versions_are_those_of_the_test_environment(image: str, against: str) -> None:
    ours, theirs = pins(ROOT / "images" / image / "constraints.txt"), pins(ROOT / against)
    other = {name: (ours[name], theirs[name]) for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert not other, f"images/{image}/constraints.txt {STALE}: {other}"
    assert image != "rollout" or theirs.keys() <= ours.keys()


def test_extensions_of_torch_are_built_for_its_version() -> None:
    """torchaudio 2.11 beside torch 2.13 may crash at import; no stage imports it."""
    pinned = pins(ROOT / "images/rollout/constraints.txt")
    assert "torchaudio" not in pinned
    assert (pinned["torch"], pinned["torchvision"]) == ("2.13.0", "0.28.0")  # the pair that PyTorch released together
    assert "torchaudio; sys_platform == 'never'" in (ROOT / "overrides.txt").read_text()


@pytest.mark.parametrize("tool", ["podman", "docker"])
@pytest.mark.parametrize("registry", ["", "registry.example.com/team/"])
def test_images_get_the_names_that_pods_ask_for(tool: str, registry: str) -> None:
    """podman would put localhost/ before a name without a registry; Kubernetes puts docker.io/."""
    command = ["make", "-n", "images", f"BUILDER={tool}", f"REGISTRY={registry}", "IMAGES=tools", "TAG=1.0"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    prefix = registry or ("docker.io/" if tool == "podman" else "")
    assert f" -t {prefix}kfp-rlhf/$image:1.0 " in said


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_no_problem(image: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "images" / image / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_images_have_no_entrypoint_a_numeric_user_and_no_unneeded_compiler(image: str) -> None:
    text = (ROOT / "images" / image / "Dockerfile").read_text(encoding="utf-8")
    final = text[text.rindex("\nFROM ") :]
    assert "ENTRYPOINT" not in text and "\nCMD" not in text
    assert "\nUSER 1000:1000\n" in final and f"selftest.py {image} " in final
    assert ("gcc" in final) == (image == "rollout")
