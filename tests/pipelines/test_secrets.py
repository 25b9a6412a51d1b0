"""Params travel into pipelines, reports and MLflow: one with a secret in it is refused before anything is written."""

from pathlib import Path

import pytest

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.runtime.stage import parse_config
from components.rlhf.text.errors import InputError
from pipelines.compile import compile_pipeline
from pipelines.settings import load_params
from tests.support.planted_secrets import PLANTED, files_with_secrets

TINY = Path(__file__).resolve().parents[2] / "pipelines/params/tiny.yaml"


def refusal(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_params(TINY, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tracking.uri", "https://someone:hunter2@mlflow.example.com"),
        ("tracking.uri", "postgresql://someone:hunter2@db/mlflow"),
        ("tracking.uri", "https://hunter2@mlflow.example.com"),
        ("model.source", "s3://bucket/model?X-Amz-Signature=hunter2"),
        ("data.prompts.path", "s3://key:hunter2@bucket/prompts.jsonl"),
        ("storage.publish_uri", "s3://key:hunter2@bucket/published"),
        ("cluster.mirrors.pypi", "https://someone:hunter2@pypi.example.com/simple"),
        ("cluster.ui_url", "https://ui.example.com/?token=hunter2"),
        ("cluster.environment", "{HTTPS_PROXY: 'http://someone:hunter2@proxy:3128'}"),
        ("data.prompts.columns", "{prompt: 'https://someone:hunter2@host'}"),
    ],
)
def test_an_address_with_credentials(key: str, value: str) -> None:
    said = refusal(f"{key}={value}")
    assert said.startswith(f"{TINY}: {key}: credentials are not allowed in settings")
    assert "in environment variables or files" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=https://mlflow.example.com:5000/path@1",
        "tracking.uri=sqlite:////tmp/a@b/mlflow.db",
        "data.prompts.path=s3://bucket/a@b.jsonl",
        "storage.endpoint_url=https://s3.example.com:9000",
        "model.source=org/model",
        "cluster.environment={NCCL_DEBUG: INFO, HTTPS_PROXY: 'http://proxy:3128', TOKENIZERS_PARALLELISM: false}",
    ],
)
def test_addresses_without(override: str) -> None:
    load_params(TINY, [override])


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY"])
def test_a_secret_among_the_variables_of_the_stages(name: str) -> None:
    said = refusal(f"cluster.environment={{{name}: hunter2}}")
    assert said.startswith(f"{TINY}: cluster.environment: {name} looks like a secret")
    assert "hunter2" not in said


def test_a_value_that_the_environment_keeps_as_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    said = refusal(f"data.prompts.path=data/{PLANTED['HF_TOKEN']}.jsonl")
    assert said.startswith(f"{TINY}: data.prompts.path holds what the environment variable HF_TOKEN holds, a secret")
    assert "PLANTED" not in said


def test_a_stage_refuses_it_too() -> None:
    with pytest.raises(InputError, match="Settings: uri: credentials are not allowed in settings") as caught:
        parse_config(TrackingConfig, '{"uri": "https://someone:hunter2@mlflow.example.com"}')
    assert "hunter2" not in str(caught.value)


def test_a_compiled_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    compile_pipeline(load_params(TINY), tmp_path / "pipeline.yaml")
    assert (tmp_path / "pipeline.yaml").stat().st_size > 10_000
    assert files_with_secrets(tmp_path) == []
