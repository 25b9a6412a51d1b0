"""Checkpoints in a store that others can write to: the latest one that verifies is restored, others are skipped with a reason."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.rlhf.checkpoints import lease as lease_module
from components.rlhf.checkpoints.files import COMPLETE, MANIFEST, STATE
from components.rlhf.checkpoints.lease import Lease
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import TrainingConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.torch import TorchEngine
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.errors import InputError
from tests.support.hostile_input import result_or_refusal

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
KEY, SHARD = "run/ppo/abc", "actor/engine-00000.safetensors"
OLD, NEW = "step-00000001-00000000", "step-00000002-00000000"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 0.02)


def engine(value: float) -> TorchEngine:
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(module.weight, value)
    return TorchEngine(module, TrainingConfig(), num_steps=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two checkpoints: step 1, whose weights are 1, and step 2, whose weights are 2."""
    root = tmp_path_factory.mktemp("saved")
    folder = CheckpointManager(FolderStore(root), KEY, CheckpointConfig())
    for step in (1, 2):
        folder.save(step, {"actor": engine(step)}, {"history": [0.5]})
        folder.wait()
        (made,) = (root / KEY).glob(f"step-{step:08d}-*")
        made.rename(made.with_name(f"step-{step:08d}-00000000"))
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "store")


def start(root: Path) -> tuple[int | None, float, list[str]]:
    """The step that a run resumes from, its weights then, and what is logged; None and 0.0 when it starts over."""
    said: list[str] = []
    folder = CheckpointManager(FolderStore(root), KEY, CheckpointConfig(), log=said.append)
    actor = engine(0.0)
    try:
        state = folder.restore({"actor": actor})
    finally:
        assert folder._lease is not None
        folder._lease.release()
    assert all(line.isprintable() and len(line) < 2000 for line in said), said
    return (None if state is None else state["step"]), float(actor.module.weight.detach()[0, 0]), said


def rewrite(path: Path, content: bytes) -> Callable[[], None]:
    """Write a file; return a function that undoes it."""
    before = path.read_bytes()
    path.write_bytes(content)
    return lambda: path.write_bytes(before) and None


def consistent(step: Path, **content: bytes) -> None:
    """Change files of a checkpoint and update its manifest."""
    entries = json.loads((step / MANIFEST).read_bytes())
    for name, data in {STATE if key == "state" else SHARD: data for key, data in content.items()}.items():
        (step / name).write_bytes(data)
        entries[name] = [hashlib.sha256(data).hexdigest(), len(data)]
    (step / MANIFEST).write_text(json.dumps(entries))


def test_latest_checkpoint_is_restored(root: Path) -> None:
    assert start(root) == (2, 2.0, [])


@FUZZ
@given(data=st.data())
def test_manifest_with_arbitrary_values(root: Path, data: st.DataObject) -> None:
    path = root / KEY / NEW / MANIFEST
    content: Any = json.loads(path.read_bytes())
    name = data.draw(st.sampled_from([SHARD, STATE]))
    match data.draw(st.sampled_from(["whole", "entry", "digest", "size", "drop", "add", "rename"])):
        case "whole":
            content = data.draw(JSON)
        case "entry":
            content[name] = data.draw(JSON)
        case "digest":
            content[name][0] = data.draw(JSON)
        case "size":
            content[name][1] = data.draw(JSON | st.just(10**400))
        case "drop":
            del content[name]
        case "add":
            content[data.draw(st.text(max_size=20))] = content[name]
        case "rename":
            content[data.draw(st.text(max_size=20))] = content.pop(name)
    undo = rewrite(path, json.dumps(content).encode())
    try:
        outcome = result_or_refusal(lambda: start(root))
        # A manifest without the shard is valid, but the engine finds nothing to load.
        assert outcome is None or outcome[:2] in [(2, 2.0), (1, 1.0)]
    finally:
        undo()


@FUZZ
@given(name=st.sampled_from([MANIFEST, STATE, SHARD]), content=st.binary(max_size=200) | st.just(b"[" * 100_000))
def test_file_of_arbitrary_bytes(root: Path, name: str, content: bytes) -> None:
    undo = rewrite(root / KEY / NEW / name, content)
    try:
        step, weight, (said,) = start(root)
        assert (step, weight) == (1, 1.0)
        assert said.startswith(f"checkpoint {NEW} is skipped: ")
    finally:
        undo()


@FUZZ
@given(state=JSON | st.fixed_dictionaries({"step": JSON}))
def test_arbitrary_state_with_a_matching_digest(root: Path, state: Any) -> None:
    consistent(root / KEY / NEW, state=json.dumps(state).encode())
    step, weight, said = start(root)
    assert weight == (1.0 if said else 2.0)
    assert isinstance(step, int)


@pytest.mark.parametrize(
    "state", [b'{"step": 1e999}', b'{"step": NaN}', b"[" * 100_000, b'{"step": 1, "step": 2}', b"\xff"]
)
def test_state_that_is_not_json(root: Path, state: bytes) -> None:
    consistent(root / KEY / NEW, state=state)
    step, weight, (said,) = start(root)
    assert (step, weight) == (1, 1.0) and "state.json cannot be read" in said


SHARDS = {
    "empty": b"",
    "header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "header that is no JSON": (4).to_bytes(8, "little") + b"nope",
    "no tensors": (2).to_bytes(8, "little") + b"{}",
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.",
}


@pytest.mark.parametrize("name", SHARDS)
def test_invalid_shard_with_a_matching_digest(root: Path, name: str) -> None:
    consistent(root / KEY / NEW, shard=SHARDS[name])
    with pytest.raises(
        InputError, match=f"checkpoint {KEY}/{NEW} verifies, but its actor cannot be loaded .*; delete it"
    ):
        start(root)
    result_or_refusal(lambda: start(root))


NAMES = [
    "../outside",
    "/etc/passwd",
    "actor/../../outside",
    "actor/engine-00000.safetensors\n",
    "actor\\engine",
    "..",
    "",
    "\x1b[2J",
    "x" * 9999,
]


@pytest.mark.parametrize("name", NAMES)
def test_manifest_names_that_leave_the_checkpoint(root: Path, name: str) -> None:
    path = root / KEY / NEW / MANIFEST
    entries = json.loads(path.read_bytes())
    path.write_text(json.dumps(entries | {name: entries[STATE]}))
    step, _, (said,) = start(root)
    assert step == 1 and "which is not a checkpoint file" in said


@pytest.mark.parametrize("name", ["actor/engine-00001.safetensors", "actor/engine.safetensors", "critic/x", "code.py"])
@pytest.mark.parametrize("linked", [True, False])
def test_file_missing_from_the_manifest(root: Path, name: str, linked: bool) -> None:
    """DeepSpeed's engine reads the shards of any number of processes."""
    path = root / KEY / NEW / name
    path.parent.mkdir(exist_ok=True)
    if linked:
        path.symlink_to(root / KEY / OLD / SHARD)
    else:
        path.write_bytes((root / KEY / OLD / SHARD).read_bytes())
    step, weight, (said,) = start(root)
    assert (step, weight) == (1, 1.0)
    assert said.endswith(f"it contains '{name}', which its manifest.json does not list")


def link_out(path: Path, root: Path) -> None:
    """Move a path out of the store and put a symbolic link to it in its place."""
    outside = root.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("name", [SHARD, STATE, MANIFEST, COMPLETE, "actor"])
def test_symlink_out_of_a_checkpoint(root: Path, name: str) -> None:
    link_out(root / KEY / NEW / name, root)
    step, weight, (said,) = start(root)
    assert (step, weight) == (1, 1.0)
    assert "link" in said


@pytest.mark.parametrize("name", [f"{KEY}/{NEW}", f"{KEY}/{OLD}"])
def test_checkpoint_that_is_a_symlink(root: Path, name: str) -> None:
    link_out(root / name, root)
    assert start(root)[0] == (1 if name.endswith(NEW) else 2)


@pytest.mark.parametrize("name", ["run", "run/ppo", KEY])
def test_parent_folder_that_is_a_symlink(root: Path, name: str) -> None:
    link_out(root / name, root)
    with pytest.raises(InputError, match="leads out of .* through a symbolic link; delete the link"):
        start(root)
    assert not list((root.parent / "outside").rglob("lease.json"))


def test_store_may_be_reached_through_a_symlink(root: Path) -> None:
    (root.parent / "here").symlink_to(root)
    assert start(root.parent / "here") == (2, 2.0, [])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [SHARD, STATE, MANIFEST, COMPLETE])
def test_pipe_or_folder_instead_of_a_file(root: Path, name: str, make: Callable[[Path], None]) -> None:
    (root / KEY / NEW / name).unlink()
    make(root / KEY / NEW / name)
    step, weight, (said,) = start(root)
    assert (step, weight) == (1, 1.0) and f"checkpoint {NEW} is skipped" in said


@pytest.mark.parametrize("name", [MANIFEST, STATE, SHARD])
def test_10_gb_file_is_refused_quickly(root: Path, name: str) -> None:
    started = time.monotonic()
    os.truncate(root / KEY / NEW / name, 10 * 10**9)  # sparse
    assert start(root)[0] == 1
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "name", ["step-00000003-zzzzzzzz", "step-00000003", "step-٣-00000000", "-", "step-99999999-00000000"]
)
def test_unrelated_folders_and_an_empty_newer_checkpoint_are_skipped(root: Path, name: str) -> None:
    (root / KEY / name).mkdir()
    (root / KEY / name / "x").write_bytes(b"x")
    assert start(root)[:2] == (2, 2.0)


# --- the lease ---


@FUZZ
@given(content=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=50) | st.just(b"[" * 9999))
def test_lease_with_arbitrary_content(root: Path, content: bytes) -> None:
    (root / KEY / "lease.json").write_bytes(content)
    assert result_or_refusal(lambda: start(root))[0] == 2


@FUZZ
@given(
    host=st.just(os.uname().nodename) | st.text(max_size=20) | st.just("x" * 5000),
    pid=st.integers() | JSON,
    rest=st.dictionaries(st.sampled_from(["owner", "started", "beat"]), JSON),
)
def test_lease_with_an_arbitrary_holder(root: Path, host: str, pid: Any, rest: dict[str, Any]) -> None:
    (root / KEY / "lease.json").write_text(json.dumps({"host": host, "pid": pid, **rest}))
    assert result_or_refusal(lambda: start(root))[0] == 2


def test_lease_that_is_a_pipe_or_symlink_is_replaced_and_a_folder_is_refused(root: Path) -> None:
    path, outside = root / KEY / "lease.json", root.parent / "outside"
    os.mkfifo(path)
    assert start(root)[0] == 2
    outside.write_text("mine")
    path.symlink_to(outside)
    assert start(root)[0] == 2
    assert outside.read_text() == "mine"
    path.mkdir()
    with pytest.raises(InputError, match="lease.json cannot be written .Is a directory.; free some space"):
        Lease(FolderStore(root), f"{KEY}/lease.json", print).acquire()
