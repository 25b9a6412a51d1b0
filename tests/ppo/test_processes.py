"""PPO in several processes: evaluations of any number of prompts, and the states that are kept, under every engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from components.ppo.validation import shared_rows
from components.rlhf.engine.group import SingleProcess
from tests.support.ppo_ranks import BEST, CASES, MANY, SICK, evaluations, turns
from tests.support.ppo_runs import without_times

ROOT = Path(__file__).resolve().parents[2]


def launch(processes: int, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, "-m", "tests.support.ppo_ranks", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", range(1, 12))
def test_every_rank_takes_equally_many_rows_and_each_row_counts_once(world_size: int, count: int) -> None:
    own, lengths = [], set()
    for rank in range(world_size):
        group = SingleProcess()
        group.rank, group.world_size = rank, world_size
        rows, num_own = shared_rows(count, group)
        assert all(0 <= row < count for row in rows)
        own += rows[:num_own]
        lengths.add(len(rows))
    assert sorted(own) == list(range(count))
    assert len(lengths) == 1 and lengths.pop() == -(-count // world_size) > 0


@pytest.fixture(scope="module")
def alone(tiny_model: Path, reward_model: Path) -> list[dict[str, Any]]:
    return evaluations(tiny_model, reward_model)


@pytest.mark.deepspeed
@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_in_several_processes_equals_that_of_one(
    tiny_model: Path, reward_model: Path, tmp_path: Path, alone: list[dict[str, Any]], processes: int
) -> None:
    launch(processes, "validation", tmp_path, tiny_model, reward_model)
    for rank in range(processes):
        theirs = json.loads((tmp_path / f"{processes}-{rank}.json").read_text())
        for count, (ours, other) in enumerate(zip(alone, theirs, strict=True), start=1):
            names = ours["metrics"].keys() - {"tokens/computed_per_real"}  # a repeated row is computed too
            assert {name: other["metrics"][name] for name in names} == pytest.approx(
                {name: ours["metrics"][name] for name in names}, rel=1e-4, abs=1e-5
            )
            assert [sample["prompt"]["id"] for sample in other["samples"]] == [prompt.id for prompt in MANY[:count]]
            for ours_sample, theirs_sample in zip(ours["samples"], other["samples"], strict=True):
                assert theirs_sample["response_ids"] == ours_sample["response_ids"]
                assert theirs_sample["score"] == pytest.approx(ours_sample["score"], abs=1e-4)
                assert theirs_sample["kl"] == pytest.approx(ours_sample["kl"], abs=1e-4)
    assert alone[4]["metrics"]["kl/sequence"] > 0.01
    assert len({len(sample["response_ids"]) for sample in alone[4]["samples"]}) > 1


@pytest.mark.deepspeed
def test_run_with_an_environment_in_two_processes_equals_that_of_one(
    tiny_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    launch(2, "turns", tmp_path, tiny_model, reward_model)
    both = [json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in range(2)]
    alone = json.loads(json.dumps(turns(tiny_model, reward_model)))
    for ours, theirs, other in zip(*(without_times(each["history"]) for each in (alone, *both)), strict=True):
        assert theirs == other
        names = ours.keys() - {"tokens/computed_per_real", "validation/tokens/computed_per_real"}
        assert {name: theirs[name] for name in names} == pytest.approx(
            {name: ours[name] for name in names}, rel=1e-3, abs=1e-4
        )
        assert 0 < ours["environment/failed"] < 0.3 and ours["environment/turns"] > 1
    assert both[0]["samples"] == both[1]["samples"]
    for ours, theirs in zip(alone["samples"], both[0]["samples"], strict=True):
        for name in ("prompt", "response_ids", "response_mask", "turns", "environment_reward", "failure"):
            assert theirs[name] == ours[name]


@pytest.fixture(scope="module")
def kept(tiny_model: Path, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    launch(2, "keep", folder, tiny_model, reward_model)
    return folder


@pytest.mark.deepspeed
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_kept_states_are_restored_bit_for_bit_under_every_engine(kept: Path, case: Any) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for key, weight in load_file(kept / f"{case.name}.safetensors").items():
        state, _, name = key.partition("/")
        states.setdefault(state, {})[name] = weight
    exported, best = states["exported"], states[f"evaluation-{BEST}"]
    assert exported.keys() == best.keys()
    assert all(torch.equal(exported[name], best[name]) for name in best)
    assert all(torch.equal(states["resumed"][name], best[name]) for name in best)
    # The update that failed left nothing behind: the policy after it is the one that sampled its rollout.
    after = states[f"evaluation-{SICK}"]
    assert all(torch.equal(after[name], best[name]) for name in best)
    for other in (0, 1, 4):
        assert any(not torch.equal(states[f"evaluation-{other}"][name], best[name]) for name in best)
