"""Compilation of the pipeline of a params file, the component.yaml of each stage, and the committed example pipelines."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kfp.compiler import Compiler

from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.dag import build_pipeline
from pipelines.settings import load_params
from pipelines.trainjob import require_launchable

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "pipelines" / "compiled"
PLACEHOLDER = re.compile(r"\{\{|\$\([A-Za-z_.-][A-Za-z0-9_.-]*\)")
EXAMPLES = ("movie_reviews", "llama3_8b_8gpu")  # for a CPU, and for a node with 8 GPUs


def compile_pipeline(params: Params, target: Path) -> Path:
    """Write the IR YAML that a cluster and the local runner execute. Raises InputError for an unusable target."""
    require_literal_values(params)
    require_launchable(params)
    if target.suffix not in (".yaml", ".yml"):
        raise InputError(f"{target} must end in .yaml or .yml, as KFP requires.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Compiler().compile(build_pipeline(params), str(target))
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); choose another path.") from None
    return target


def require_literal_values(params: Params) -> None:
    """Raise InputError for a value that the platform would change on its way to a stage.

    KFP and Argo replace {{...}}, and Kubernetes replaces $(NAME) in the arguments of a container.
    """
    for key, text in _texts(params.model_dump(mode="json")):
        found = PLACEHOLDER.search(text)
        if found:
            platform = "Kubernetes" if found.group()[0] == "$" else "Kubeflow Pipelines or Argo"
            raise InputError(
                f"{key} contains {found.group()[:40]}, which {platform} would replace; write it differently, or put it into a file."
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in the parameters, names of keys included, with the dotted key where it is."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield key or "the params file", name
            yield from _texts(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{number}]")


def compile_manifests(params: Params, target: Path, *, namespace: str | None = None) -> Path:
    """Write a Pipeline and a PipelineVersion object for the Kubernetes native API of Kubeflow Pipelines."""
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    from pipelines.cluster.versions import version_name

    compile_pipeline(params, target)
    name = params.cluster.pipeline
    version = version_name(name, target)
    Compiler().compile(
        build_pipeline(params),
        str(target),
        kubernetes_manifest_format=True,
        kubernetes_manifest_options=KubernetesManifestOptions(
            pipeline_name=name,
            pipeline_version_name=version,
            pipeline_version_display_name=version,
            namespace=namespace,
            include_pipeline_manifest=True,
        ),
    )
    return target


def stage_names() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "components").glob("*/component.py"))


def compile_component(stage: str, target: Path) -> None:
    """Write component.yaml of one stage, without kfp's patch version."""
    component = getattr(importlib.import_module(f"components.{stage}.component"), stage)
    Compiler().compile(component, str(target))
    target.write_text(_without_patch_version(target), encoding="utf-8")


def compile_example(name: str, target: Path) -> None:
    """Write the compiled pipeline of pipelines/params/NAME.yaml, without kfp's patch version and without its comment.

    The comment has the keys of dicts in any order, and the file shall change only with the pipeline.
    """
    compile_pipeline(load_params(ROOT / "pipelines" / "params" / f"{name}.yaml"), target)
    target.write_text(re.sub(r"\A(#.*\n)+", "", _without_patch_version(target)), encoding="utf-8")


def _without_patch_version(target: Path) -> str:
    return re.sub(r"sdkVersion: kfp-[\w.]+", "sdkVersion: kfp-2.17", target.read_text(encoding="utf-8"))
