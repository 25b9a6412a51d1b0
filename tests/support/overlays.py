"""Builds overlays as manifests/README.md describes: secrets from the committed examples, then kubectl kustomize."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = sorted(path.name for path in (ROOT / "manifests" / "overlays").iterdir() if path.is_dir())
BUILDS = [*OVERLAYS, *(f"standalone+{name}" for name in ("kueue", "checkpoint-claim", "run-claims", "trainjob"))]
Object = dict[str, Any]


def copy_manifests(folder: Path) -> Path:
    """A copy of manifests/ without the files of secrets, except the examples."""
    copy = folder / "manifests"

    def without_secrets(path: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(path).name == "secrets" and not name.endswith(".example")}

    shutil.copytree(ROOT / "manifests", copy, ignore=without_secrets)
    return copy


@cache
def build(name: str) -> str:
    """The YAML of an overlay; `standalone+kueue` adds the component kueue to it."""
    overlay, _, component = name.partition("+")
    with TemporaryDirectory() as folder:
        manifests = copy_manifests(Path(folder))
        subprocess.run([manifests / "make-secrets.sh", overlay], check=True, capture_output=True)
        if component:
            file = manifests / "overlays" / overlay / "kustomization.yaml"
            assert "components: [" in file.read_text()
            file.write_text(file.read_text().replace("components: [", f"components: [../../components/{component}, "))
        run = subprocess.run(
            [KUBECTL, "kustomize", manifests / "overlays" / overlay], capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", f"warnings of kustomize: {run.stderr}"
    return run.stdout


@cache
def _objects(name: str) -> list[Object]:
    return [item for item in yaml.load_all(build(name), Loader=yaml.CSafeLoader) if item]


def objects(name: str) -> list[Object]:
    """The objects of an overlay, which the caller may change."""
    return deepcopy(_objects(name))


def of_kind(name: str, *kinds: str) -> list[Object]:
    return [item for item in objects(name) if item["kind"] in kinds]


def pods(name: str) -> Iterator[tuple[Object, Object, Object]]:
    """(owner, metadata, spec) of every pod template."""
    for owner in objects(name):
        template = owner.get("spec", {}).get("template") if isinstance(owner.get("spec"), dict) else None
        if template and "spec" in template and "containers" in template["spec"]:
            yield owner, template["metadata"], template["spec"]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]
