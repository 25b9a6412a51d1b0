"""The committed pipelines are up to date, independent of key order, kfp's patch version and the git revision."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from components.rlhf.text.errors import InputError
from pipelines.compile import COMMITTED, EXAMPLES, ROOT, compile_example, compile_pipeline
from pipelines.local.run import run_pipeline
from pipelines.settings import load_params


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_committed_pipelines_are_the_examples() -> None:
    assert sorted(path.name for path in COMMITTED.iterdir()) == sorted(f"{name}.yaml" for name in EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_committed_pipelines_are_up_to_date(name: str, tmp_path: Path) -> None:
    """Compared with the output of `compile` and `submit`."""
    params = load_params(ROOT / "pipelines" / "params" / f"{name}.yaml")
    compiled, committed = (
        documents(compile_pipeline(params, tmp_path / "p.yaml")),
        documents(COMMITTED / f"{name}.yaml"),
    )
    assert len(compiled) == len(committed) == 2  # pipeline and platform
    assert (
        re.fullmatch(r"kfp-2\.17\.\d+", compiled[0].pop("sdkVersion")) and committed[0].pop("sdkVersion") == "kfp-2.17"
    )
    assert compiled == committed, "run make compile"


@pytest.mark.parametrize("name", EXAMPLES)
def test_compiled_pipeline_contains_no_local_path_or_revision(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CODE_REVISION", "0123456789abcdef0123456789abcdef01234567")
    compile_example(name, tmp_path / "p.yaml")
    for text in ((tmp_path / "p.yaml").read_text(), (COMMITTED / f"{name}.yaml").read_text()):
        assert not re.search(r"\b[0-9a-f]{40}\b|01234567", text) and str(ROOT) not in text
        assert not re.search(r"(: |')/(home|root|tmp|Users)/", text)


@pytest.mark.parametrize("name", EXAMPLES)
def test_keys_are_sorted(name: str) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert list(value) == sorted(value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)

    check(documents(COMMITTED / f"{name}.yaml"))


# --- values that the platform would change ---


@pytest.mark.parametrize("text", ["{{workflow.name}}", "a {{$.inputs}} b", "{{", "$(HOME)", "x$(MLFLOW_TRACKING_URI)y"])
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("preset={}", "preset"),
        ("model.source={}", "model.source"),
        ("data.prompts={{path: p.jsonl, columns: {{prompt: {}}}}}", "data.prompts.columns.prompt"),
        ("data.prompts=[{{path: a.jsonl}}, {{path: {}}}]", "data.prompts[1].path"),
        ("cluster.environment={{A: {}}}", "cluster.environment.A"),
        ("tracking.experiment={}", "tracking.experiment"),
        ("storage.publish_uri={}", "storage.publish_uri"),
    ],
)
def test_values_that_the_platform_would_replace_are_refused(text: str, override: str, key: str, tmp_path: Path) -> None:
    """KFP and Argo replace {{...}} everywhere in a workflow, Kubernetes $(NAME) in the arguments of a container."""
    params = load_params(ROOT / "pipelines/params/tiny.yaml", [override.format(json.dumps(text))])
    with pytest.raises(
        InputError, match=rf"^{re.escape(key)} contains .*, which .* would replace; write it differently"
    ):
        compile_pipeline(params, tmp_path / "p.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", ["{{a: {}}}", "{{{}: a}}"])
@pytest.mark.parametrize("text", ["{{workflow.name}}", "$(HOME)"])
def test_labels_with_such_values_are_refused_before(text: str, labels: str) -> None:
    with pytest.raises(InputError, match=r"cluster.profiles.cpu.labels"):
        load_params(
            ROOT / "pipelines/params/tiny.yaml",
            [f"cluster.profiles={{cpu: {{labels: {labels.format(json.dumps(text))}}}}}"],
        )


@pytest.mark.parametrize("text", ["{a}", "}}", "$HOME", "$(", "$5 (US)", "$$", "{ {x} }", "$(a b)"])
def test_other_braces_and_dollars_are_accepted(text: str, tmp_path: Path) -> None:
    params = load_params(ROOT / "pipelines/params/tiny.yaml", [f"tracking.experiment={json.dumps(text)}"])
    compiled = documents(compile_pipeline(params, tmp_path / "p.yaml"))[0]
    tracking = json.loads(compiled["root"]["inputDefinitions"]["parameters"]["tracking"]["defaultValue"])
    assert tracking["experiment"] == text


@pytest.mark.parametrize(
    "override", ["tracking.experiment='{{x}}'", "storage.publish_uri=RUN/models", "storage.publish_uri=RUN"]
)
def test_run_that_is_refused_leaves_no_directory(override: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [override.replace("RUN", str(run / "checkpoints")), f"storage.checkpoint_uri={run / 'checkpoints'}"]
    with pytest.raises(InputError) as caught:
        params = load_params(ROOT / "pipelines/params/tiny.yaml", settings)
        run_pipeline(params, run, tracking_uri="", console=Console())
    assert "would replace" in str(caught.value) or "use separate prefixes" in str(caught.value)
    assert not run.exists()


def test_published_models_may_not_contain_the_run_directory(tmp_path: Path) -> None:
    params = load_params(ROOT / "pipelines/params/tiny.yaml", [f"storage.publish_uri={tmp_path}"])
    with pytest.raises(
        InputError, match="^storage: checkpoint_uri is .*/run/checkpoints, which is inside, or contains, publish_uri"
    ):
        run_pipeline(params, tmp_path / "run", tracking_uri="", console=Console())
    assert list(tmp_path.iterdir()) == []
