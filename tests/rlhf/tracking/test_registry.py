"""Registration of model versions, for both decisions and without a registry."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking.registry import make_champion, register_version
from components.rlhf.tracking.texts import database_uri
from tests.support.mlflow_database import new_database


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    folder = tmp_path_factory.mktemp("registry")
    return TrackingConfig(uri=database_uri(new_database(folder)), registered_model="toy")


def test_versions_aliases_and_retries(tracking: TrackingConfig, tmp_path: Path) -> None:
    def register(run_id: str, decision: str) -> str:
        lineage = {"digest": f"digest of {run_id}", "parent_sft_model": "abc"}
        return register_version(
            tracking, folder=tmp_path, run_id=run_id, decision=decision, reason="because", lineage=lineage
        )

    (tmp_path / "MLmodel").write_text("{}", encoding="utf-8")
    client = MlflowClient(tracking_uri=tracking.uri, registry_uri=tracking.uri)
    assert register("first", "promote") == "1"
    assert register("second", "reject") == "2"
    assert client.get_model_version_by_alias("toy", "champion").version == 1  # unchanged
    assert client.get_model_version_by_alias("toy", "candidate").version == 2
    assert register("third", "promote") == "3"
    assert client.get_model_version_by_alias("toy", "champion").version == 3
    assert register("third", "promote") == "3"  # a retry creates no second version
    assert make_champion(tracking, "first") == "1"
    assert make_champion(tracking, "second") == ""  # it was rejected
    assert make_champion(tracking, "fourth") == ""
    assert client.get_model_version_by_alias("toy", "champion").version == 1
    rejected = client.get_model_version("toy", "2")
    parents = client.search_runs([client.get_experiment_by_name("kfp-rlhf").experiment_id])
    parent = next(run for run in parents if run.data.tags["rlhf.run_id"] == "second")
    assert rejected.run_id == parent.info.run_id and rejected.source == f"{parent.info.artifact_uri}/model"
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "model")] == ["model/MLmodel"]
    assert rejected.tags == {
        "decision": "reject", "reason": "because", "rlhf.run_id": "second", "digest": "digest of second", "parent_sft_model": "abc",
    }  # fmt: skip


def test_version_of_another_policy_links_to_its_weights(tracking: TrackingConfig, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=tracking.uri, registry_uri=tracking.uri)
    for digest in ("one", "one", "two"):
        (tmp_path / "link.json").write_text(digest, encoding="utf-8")
        version = register_version(
            tracking, folder=tmp_path, run_id="again", decision="", reason="", lineage={"digest": digest}
        )
        run_id = client.get_model_version("toy", version).run_id
        assert Path(client.download_artifacts(run_id, "model/link.json")).read_text(encoding="utf-8") == digest


def test_missing_registry_does_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    version = {"folder": Path("x"), "run_id": "r", "decision": "promote", "reason": "", "lineage": {}}
    assert register_version(TrackingConfig(), **version) == ""
    assert register_version(TrackingConfig(enabled=False, uri="sqlite:////nowhere"), **version) == ""
    assert register_version(TrackingConfig(uri="http://127.0.0.1:9"), **version) == ""
    assert "warning: MLflow could not be used" in capsys.readouterr().err
    assert make_champion(TrackingConfig(), "r") == make_champion(TrackingConfig(uri="http://127.0.0.1:9"), "r") == ""
    assert "warning: MLflow could not be used" in capsys.readouterr().err
