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
