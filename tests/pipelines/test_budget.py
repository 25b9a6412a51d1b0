"""cluster.budget from the params file to the stages, and what cannot work is refused before anything runs."""

import json
from pathlib import Path

import pytest
import yaml

from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.local.journal import command_digest
from pipelines.placement import require_checkpoints_for_budget
from pipelines.settings import judge_reward_model_settings, load_params, settings_of_stage

PARAMS = {
    "data": {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "preferences", "prompts")},
    "judge": {"kind": "reward_model"},
    "cluster": {
        "budget": 500,
        "stages": {"ppo": "dear"},
        "profiles": {"cpu": {"price_per_hour": 0.5}, "dear": {"like": "cpu", "price_per_hour": 40}},
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
    return path


def test_stages_get_the_budget_and_the_price_of_their_profile(file: Path) -> None:
    params = load_params(file)
    prices = {"sft": 0.5, "reward_model": 0.5, "ppo": 40.0}
    found = {stage: json.loads(settings_of_stage(params, stage))["budget"] for stage in prices}
    assert found == {stage: {"limit": 500.0, "price_per_hour": price} for stage, price in prices.items()}
    assert json.loads(judge_reward_model_settings(params))["budget"] == found["reward_model"]


def test_budget_without_a_price_is_refused(file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_params(file, ["cluster.profiles.dear={}"])
    message = "cluster.budget is 500, but the price of ppo is unknown; set cluster.profiles.dear.price_per_hour"
    assert message in str(caught.value)
    load_params(file, ["cluster.profiles.dear={}", "cluster.budget=null"])


def test_price_of_an_imported_sft_model_is_not_needed(file: Path) -> None:
    overrides = ["cluster.profiles.free={}", "cluster.stages.sft=free"]
    with pytest.raises(InputError, match="the price of sft is unknown"):
        load_params(file, overrides)
    load_params(file, [*overrides, "sft.use=s3://bucket/sft"])


@pytest.mark.parametrize(
    "override",
    ["storage.uri=s3://b/p", "cluster.checkpoint_claim=shared", "cluster.checkpoint_volume.storage_class=fast"],
)
def test_budget_needs_checkpoints_on_a_cluster(file: Path, override: str) -> None:
    with pytest.raises(InputError, match="cluster.budget is 500, but no checkpoints are saved"):
        require_checkpoints_for_budget(load_params(file))
    require_checkpoints_for_budget(load_params(file, [override]))
    require_checkpoints_for_budget(load_params(file, ["cluster.budget=null"]))


def test_compilation_refuses_a_budget_without_checkpoints(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoints are saved"):
        cli.main(["compile", str(file), "--out", str(tmp_path / "pipeline.yaml")], standalone_mode=False)
    assert not (tmp_path / "pipeline.yaml").exists()


def test_finished_stage_is_reused_with_another_budget_only(file: Path) -> None:
    def digest(*overrides: str) -> str:
        settings = settings_of_stage(load_params(file, overrides), "sft")
        executor_input = json.dumps({"inputs": {"parameterValues": {"settings": settings, "storage": "{}"}}})
        return command_digest(
            ["python", "-m", "components.sft", "--settings", settings, "--executor-input", executor_input], Path("/run")
        )

    assert digest("cluster.budget=900") == digest()
    assert digest("cluster.budget=null", "cluster.profiles.cpu.price_per_hour=7") == digest()
    assert digest("sft.max_steps=3") != digest()
