"""sft and ppo on two nodes with networks, host names, process ids and /tmp of their own: same results as on one, or one sentence.

The nodes are Linux namespaces, so this needs root; it is skipped elsewhere, and the reason says so.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.rlhf.artifacts.manifest import read_manifest
from tests.support.node_cases import SETTINGS
from tests.support.node_inputs import options, write_inputs
from tests.support.two_nodes import ROOT, SHARED, Cluster, Launched, two_nodes, why_impossible

pytestmark = [pytest.mark.deepspeed, pytest.mark.vllm]
REFUSED = {
    "other-settings": "rank 1 (node node-1) has sft.training.learning_rate 0.002, and rank 0 (node node-0) has 0.001; start all nodes",
    "other-revision": "rank 1 (node node-1) has code revision def, and rank 0 (node node-0) has abc; start all nodes",
    "other-input": "rank 1 (node node-1) has the input demonstrations of digest ",
    "other-number": "2 processes have been started (WORLD_SIZE), and sft.training.num_processes is 3; make them equal.",
    "unshared": "rank 1 (node node-1) does not see the checkpoint folder /tmp/checkpoints of node node-0, which all nodes must share;",
    "vllm-across-nodes": "ppo.rollout.vllm.tensor_parallel_size is 2, but must divide the 1 processes of each node",
}
TRAINED = [case for case in SETTINGS if case not in REFUSED]
FOUR = ["ppo-zero3"]  # with two processes on each node
FOLDERS = ("inputs", "out", "checkpoints")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_impossible():
        pytest.skip(f"NOT TESTED: several nodes; this needs network and mount namespaces, and root ({reason})")
    with two_nodes(tmp_path_factory.mktemp("nodes")) as cluster:
        for name in FOLDERS:
            (cluster.shared / name).mkdir()
        write_inputs(cluster.shared / "inputs")
        shutil.copytree(cluster.shared / "inputs", cluster.shared / "other-inputs")
        manifest = cluster.shared / "other-inputs" / "demonstrations" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"facts": {"other": 1}}))
        yield cluster


def run_cases(cluster: Cluster, num_processes: int, cases: list[str], out: Path) -> Launched:
    (cluster.shared / out.name).mkdir(exist_ok=True)
    paths = [str(path) for path in (SHARED / "inputs", out, SHARED / "checkpoints")]
    return cluster.launch("tests.support.node_cases", [str(num_processes), *paths, *cases], out.name)


@pytest.fixture(scope="module")
def two(cluster: Cluster) -> Path:
    """The results of two processes, each on a node of its own."""
    launched = run_cases(cluster, 2, list(SETTINGS), SHARED / "out")
    assert launched.wait(600) == (0, 0), launched.said(0) + launched.said(1)
    return cluster.shared / "out"


@pytest.fixture(scope="module")
def one(cluster: Cluster) -> Path:
    """The results of two processes on one node."""
    paths = [cluster.shared / "inputs", cluster.shared / "one", cluster.shared / "checkpoints-of-one"]
    paths[1].mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.node_cases", "2", *map(str, paths), *TRAINED],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return paths[1]


def weights_digest(folder: Path) -> str:
    return read_manifest(folder / "model").files["model.safetensors"].sha256


@pytest.mark.parametrize("case", TRAINED)
def test_two_nodes_train_as_one_node_with_as_many_processes(one: Path, two: Path, case: str) -> None:
    """Bit for bit."""
    assert weights_digest(one / case) == weights_digest(two / case)
    assert (two / case / "metrics").is_file()


@pytest.mark.parametrize("case", REFUSED)
def test_nodes_that_disagree_are_refused_on_every_rank(cluster: Cluster, two: Path, case: str) -> None:
    """With the same sentence, and nothing is written."""
    for rank in (0, 1):
        assert (two / f"{case}-{rank}.error").read_text().startswith(f"error: {REFUSED[case]}")
    assert not (two / case).exists()
    if case != "vllm-across-nodes":  # which the launchers would have refused before
        assert not (cluster.shared / "checkpoints" / f"run-{case}").exists()
    for folder in (cluster.shared / "checkpoints", cluster.folder / "node-0" / "tmp" / "checkpoints"):
        assert not list(folder.glob("shared-*"))


def test_two_processes_on_each_node_train_like_one_each(cluster: Cluster, one: Path) -> None:
    launched = run_cases(cluster, 4, FOUR, SHARED / "four")
    assert launched.wait(600) == (0, 0), launched.said(0) + launched.said(1)
    for case in FOUR:
        expected, found = (
            load_file(folder / case / "model" / "model.safetensors") for folder in (one, cluster.shared / "four")
        )
        gaps = torch.cat([(expected[name] - found[name]).abs().flatten() for name in expected])
        assert gaps.max() < 2e-4 and gaps.mean() < 1e-5


def test_lost_node_is_named_and_the_run_resumes_on_both(cluster: Cluster, two: Path) -> None:
    """The programs as a TrainJob starts them; the name of node rank 0 resolves some seconds after they start."""
    stage, settings = SETTINGS["ppo-torch"]
    arguments = options(stage, settings(2), SHARED / "inputs", SHARED / "lost", SHARED / "checkpoints")
    environment = [{"RLHF_RUN_ID": "lost"}] * 2
    cluster.hide_name()
    first = cluster.launch("components.ppo", arguments, "lost", env=environment)
    time.sleep(3)
    cluster.publish_name()
    while not list(cluster.shared.glob("checkpoints/run-lost/ppo/*/step-*/.complete")):
        assert [process.poll() for process in first.processes] == [None, None], first.said(0) + first.said(1)
        time.sleep(0.02)
    cluster.nodes[1].lose()
    lost_at = time.monotonic()
    assert first.wait(120)[0] == 1
    assert time.monotonic() - lost_at < 60
    assert first.errors(0) and first.errors(0)[-1].startswith(
        "error: node rank 1 (node-1) is gone: it has sent no sign of life for "
    )
    assert not (cluster.shared / "lost").exists()

    again = cluster.launch("components.ppo", arguments, "again", env=environment)
    assert again.wait(300) == (0, 0), again.said(0) + again.said(1)
    assert "[ppo] resuming after iteration" in again.said(0)
    assert weights_digest(cluster.shared / "lost") == weights_digest(two / "ppo-torch")
    assert not list(cluster.shared.glob("checkpoints/run-lost/ppo/*"))
