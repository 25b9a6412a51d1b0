"""Builds overlays as a reader of manifests/README.md does: secrets from the committed examples, then kubectl kustomize."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = sorted(path.name for path in (ROOT / "manifests" / "overlays").iterdir() if path.is_dir())
BUILDS = [*OVERLAYS, "standalone+kueue"]
Object = dict[str, Any]


def copy_manifests(folder: Path) -> Path:
    """A copy without anybody's real secrets."""
    here = folder / "manifests"

    def without_secrets(path: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(path).name == "secrets" and not name.endswith(".example")}

    shutil.copytree(ROOT / "manifests", here, ignore=without_secrets)
    return here


@cache
def built(name: str) -> str:
    """The YAML of an overlay; `standalone+kueue` adds the component kueue to it."""
    overlay, _, component = name.partition("+")
    with TemporaryDirectory() as folder:
        here = copy_manifests(Path(folder))
        subprocess.run([here / "make-secrets.sh", overlay], check=True, capture_output=True)
        if component:
            page = here / "overlays" / overlay / "kustomization.yaml"
            page.write_text(page.read_text().replace("components: [", f"components: [../../components/{component}, "))
        run = subprocess.run(
            [KUBECTL, "kustomize", here / "overlays" / overlay], capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", f"kustomize warns: {run.stderr}"
    return run.stdout


def objects(name: str) -> list[Object]:
    return [found for found in yaml.safe_load_all(built(name)) if found]


def of_kind(name: str, *kinds: str) -> list[Object]:
    return [found for found in objects(name) if found["kind"] in kinds]


def pods(name: str) -> Iterator[tuple[Object, Object, Object]]:
    """(owner, metadata of the pod template, spec of the pod) of everything that makes pods."""
    for owner in objects(name):
        template = owner.get("spec", {}).get("template") if isinstance(owner.get("spec"), dict) else None
        if template and "spec" in template and "containers" in template["spec"]:
            yield owner, template["metadata"], template["spec"]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]
