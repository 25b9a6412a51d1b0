"""Every kind of artifact has a type of its own in KFP, so that a wrong connection does not compile."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import dsl
from kfp.dsl.types.type_utils import InconsistentTypeException

from components.import_model.component import import_model, import_reward_model, import_sft_model
from components.ppo.component import ppo
from components.rlhf.artifacts.manifest import KINDS
from components.sft.component import sft

ROOT = Path(__file__).resolve().parents[2]
VIEWED = {
    "system.Metrics",
    "system.ClassificationMetrics",
    "system.HTML",
    "system.Markdown",
}  # by the UI of Kubeflow Pipelines


def definitions() -> list[tuple[str, str, str]]:
    """(stage, name, schema title) of every artifact of every component."""
    found = []
    for path in sorted((ROOT / "components").glob("*/component.yaml")):
        (component,) = yaml.safe_load(path.read_text())["components"].values()
        for kind in ("inputDefinitions", "outputDefinitions"):
            for name, artifact in component.get(kind, {}).get("artifacts", {}).items():
                found.append((path.parent.name, name, artifact["artifactType"]["schemaTitle"]))
    return found


def test_every_artifact_that_stages_exchange_has_its_own_type() -> None:
    generic = {
        (stage, name)
        for stage, name, title in definitions()
        if title in ("system.Artifact", "system.Model", "system.Dataset")
    }
    assert generic == {("reward_model", "base_model")}  # a base model, or an imported reward model
    titles = {title for _, _, title in definitions()} - VIEWED - {"system.Artifact"}
    kinds = {re.sub(r"(?<!^)(?=[A-Z])", "_", title.removeprefix("system.Rlhf")).lower() for title in titles}
    assert kinds - {"policy", "policy_manifest"} <= set(KINDS) and "policy" in kinds


def connect(source: Any, target: Any, name: str) -> None:
    inputs = target.component_spec.inputs

    @dsl.pipeline(name="wrong")
    def wrong() -> None:
        others = {
            other: dsl.importer("s3://b/a", artifact_class(spec.type)).output
            for other, spec in inputs.items()
            if spec.type.startswith("system.") and other != name
        }
        target(**{name: source(settings="{}").outputs["model"]}, settings="{}", **others)

    assert wrong


def artifact_class(bundled: str) -> type[dsl.Artifact]:
    title, version = bundled.split("@")
    return type("Any", (dsl.Artifact,), {"schema_title": title, "schema_version": version})


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [
        (import_model, ppo, "sft_model"),
        (import_sft_model, sft, "base_model"),
        (import_sft_model, ppo, "reward_model"),
        (import_reward_model, ppo, "sft_model"),
    ],
)
def test_model_of_another_kind_does_not_compile(source: Any, target: Any, name: str) -> None:
    with pytest.raises(InconsistentTypeException, match="is incompatible with the input type"):
        connect(source, target, name)


@pytest.mark.parametrize(
    ("source", "target", "name"),
    [
        (import_model, sft, "base_model"),
        (import_sft_model, ppo, "sft_model"),
        (import_reward_model, ppo, "reward_model"),
    ],
)
def test_model_of_the_right_kind_compiles(source: Any, target: Any, name: str) -> None:
    connect(source, target, name)
