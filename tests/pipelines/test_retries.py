"""What is retried, by a model of Argo (tests/support/argo.py): the promises of manifests/README.md and its table."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.rlhf.runtime.termination import message_of
from components.rlhf.text.errors import InputError, RetryableError
from pipelines.settings import load_params
from tests.support.argo import (
    DEADLINE,
    DELETED,
    EVICTED,
    NODE_SHUTDOWN,
    OOM_KILLED,
    STOCK,
    Attempts,
    PodEnd,
    always,
    exited,
    simulate,
    then_success,
)
from tests.support.compiled_pipelines import CompiledPipeline

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "stock": yaml.safe_load(STOCK)["spec"],
    "recommended": yaml.safe_load(
        yaml.safe_load((ROOT / "manifests/argo-retries.yaml").read_text())["data"]["workflowDefaults"]
    )["spec"],
    "Always": {"templateDefaults": {"retryStrategy": {"limit": "2", "retryPolicy": "Always"}}},
}
INVALID = exited(message_of(InputError("Settings: ppo.lr is 0; it must be positive.")), seconds=30)
ENDS = {
    "the stage reports an error in its input": INVALID,
    "the stage fails otherwise": exited(
        message_of(RuntimeError("CUDA error: an illegal memory access was encountered"))
    ),
    "a store could not be reached": exited(message_of(RetryableError("s3://b: could not read in 600 s of retries."))),
    "killed for its memory": OOM_KILLED,
    "evicted": EVICTED,
    "node shut down (spot)": NODE_SHUTDOWN,
    "time limit": DEADLINE,
    "pod deleted, node lost": DELETED,
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The retryPolicy of every task of a compiled pipeline for GPUs."""
    params = load_params(ROOT / "pipelines/params/llama3_8b_8gpu.yaml")
    compiled = CompiledPipeline(params, tmp_path_factory.mktemp("gpus"))
    return {stage: task.get("retryPolicy") for stage, task in compiled.tasks.items()}


def outcome(policy: Any, setting: str, end: PodEnd) -> Attempts:
    return simulate(policy, DEFAULTS[setting], always(end))


@pytest.mark.parametrize("end", [end for end in ENDS.values() if end is not INVALID], ids=lambda end: end.message[:40])
def test_every_stage_is_retried_under_the_recommended_setting(policies: dict[str, Any], end: PodEnd) -> None:
    for policy in policies.values():
        attempts = outcome(policy, "recommended", end)
        assert (len(attempts.pods), attempts.notified) == (4, 1)
        resumed = simulate(policy, DEFAULTS["recommended"], then_success(end, end))
        assert (len(resumed.pods), resumed.phase, resumed.notified) == (3, "Succeeded", 1)


def test_attempts_of_a_day_are_retried(policies: dict[str, Any]) -> None:
    day = PodEnd("Error", "pod deleted", seconds=24 * 3600)
    assert len(simulate(policies["ppo"], DEFAULTS["recommended"], always(day)).pods) == 4


def test_cap_of_ten_minutes_would_end_the_retries_of_long_attempts() -> None:
    """The model knows the fault: kfp's backoff_max_duration counts from the start of the first attempt."""
    policy = {"maxRetryCount": 3, "backoffDuration": "60s", "backoffFactor": 2.0, "backoffMaxDuration": "600s"}
    long = PodEnd("Failed", "evicted", seconds=601)
    assert len(simulate(policy, DEFAULTS["recommended"], always(long)).pods) == 1


@pytest.mark.parametrize("setting", ["stock", "recommended"])
def test_an_error_in_the_input_starts_one_pod_and_one_notification(policies: dict[str, Any], setting: str) -> None:
    for stage, policy in policies.items():
        attempts = outcome(policy, setting, INVALID)
        assert (len(attempts.pods), attempts.notified, attempts.phase) == (1, 1, "Failed"), stage
        assert "Settings: ppo.lr is 0; it must be positive." in attempts.message  # what the user is told


def test_table_of_the_manifests_is_that_of_the_model(policies: dict[str, Any]) -> None:
    text = (ROOT / "manifests/README.md").read_text()
    table = re.search(r"<!-- retries -->\n(.*?)<!-- /retries -->", text, re.DOTALL)
    assert table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.group(1).strip().splitlines()]
    expected = [
        [name, *(str(len(outcome(policies["ppo"], setting, end).pods)) for setting in DEFAULTS)]
        for name, end in ENDS.items()
    ]
    assert rows[0][1:] == ["as installed", "argo-retries.yaml", "`retryPolicy: Always`"] and rows[2:] == expected
