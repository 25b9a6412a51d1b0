"""Parameters are copied into pipelines, reports and MLflow, so that one with a secret is rejected first."""

from pathlib import Path

import pytest

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.runtime.stage import parse_config
from components.rlhf.text.errors import InputError
from pipelines.compile import compile_pipeline
from pipelines.settings import load_params
from tests.support.planted_secrets import PLANTED, files_with_secrets

TINY = Path(__file__).resolve().parents[2] / "pipelines/params/tiny.yaml"


def load_error(*overrides: str) -> str:
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
def test_uri_with_credentials_is_rejected(key: str, value: str) -> None:
    message = load_error(f"{key}={value}")
    assert message.startswith(f"{TINY}: {key}: credentials are not allowed in settings")
    assert "in environment variables or files" in message
    assert "hunter2" not in message


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
def test_uri_without_credentials_is_accepted(override: str) -> None:
    load_params(TINY, [override])


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY"])
def test_secret_in_cluster_environment_is_rejected(name: str) -> None:
    message = load_error(f"cluster.environment={{{name}: hunter2}}")
    assert message.startswith(f"{TINY}: cluster.environment: {name} looks like a secret")
    assert "hunter2" not in message


def test_parameter_with_a_secret_of_the_environment_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    message = load_error(f"data.prompts.path=data/{PLANTED['HF_TOKEN']}.jsonl")
    assert message.startswith(f"{TINY}: data.prompts.path contains the secret in the environment variable HF_TOKEN")
    assert "PLANTED" not in message


def test_stage_rejects_credentials_too() -> None:
    with pytest.raises(InputError, match="Settings: uri: credentials are not allowed in settings") as caught:
        parse_config(TrackingConfig, '{"uri": "https://someone:hunter2@mlflow.example.com"}')
    assert "hunter2" not in str(caught.value)


def test_compiled_pipeline_contains_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    compile_pipeline(load_params(TINY), tmp_path / "pipeline.yaml")
    assert (tmp_path / "pipeline.yaml").stat().st_size > 10_000
    assert files_with_secrets(tmp_path) == []
