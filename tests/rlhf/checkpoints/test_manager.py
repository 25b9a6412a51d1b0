"""Checkpoints in a folder: atomic, verified, and the latest valid one is restored."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from components.rlhf.checkpoints import files, manager
from components.rlhf.checkpoints.files import COMPLETE
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.checkpoints.stop_signal import StopSignal
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.group import SingleProcess
from components.rlhf.engine.protocol import StepInfo
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.errors import InputError


class Counter:
    """An engine that keeps one number."""

    module = nn.Identity()
    peak = 1.0

    def __init__(self, number: int = 0) -> None:
        self.number = torch.tensor(number)

    def backward(self, loss: Tensor, last: bool) -> None: ...

    def step(self) -> StepInfo:
        raise NotImplementedError

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "number", self.number

    def snapshot(self, *, moments: bool = True) -> dict[str, Tensor]:
        return {"number": self.number.clone()}

    def load(self, directory: Path) -> None:
        self.number = load_file(directory / "engine-00000.safetensors")["number"]


class Broken(FolderStore):
    """A store that cannot write files of a given name."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder)
        self.name = name

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        if key.endswith(self.name):
            raise OSError(28, "No space left on device")
        return super().write(key, data, only_if_absent=only_if_absent)


class Saver:
    """A stage that saves to a folder and keeps its log lines."""

    def __init__(
        self, store: FolderStore | Path | None, *, key: str = "ppo/abc", stop: StopSignal | None = None, **config: Any
    ) -> None:
        self.said: list[str] = []
        store = FolderStore(store) if isinstance(store, Path) else store
        self.folder = CheckpointManager(store, key, CheckpointConfig(**config), SingleProcess(), self.said.append, stop)

    def save(self, step: int, number: int | None = None, **state: Any) -> None:
        self.folder.save(step, {"actor": Counter(step if number is None else number)}, state)
        self.folder.wait()

    def restore(self) -> tuple[dict[str, Any] | None, int]:
        actor = Counter(-1)
        try:
            return self.folder.restore({"actor": actor}), int(actor.number)
        finally:
            if self.folder._lease:
                self.folder._lease.release()


def steps(root: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (root / "ppo" / "abc").glob("step-*"))


def latest(root: Path) -> Path:
    return max((root / "ppo" / "abc").glob("step-*"))


def test_restore_returns_what_was_saved(tmp_path: Path) -> None:
    state = {"kl_coef": 0.1 + 0.2, "history": [{"a": 1.5}], "best": None}
    first = Saver(tmp_path)
    first.folder.save(7, {"actor": Counter(3), "critic": Counter(4)}, state)
    first.folder.wait()
    actor, critic = Counter(), Counter()
    again = Saver(tmp_path).folder
    assert again.latest is None
    assert again.restore({"actor": actor, "critic": critic}) == {"step": 7, **state}
    assert (int(actor.number), int(critic.number)) == (3, 4)
    assert again.latest == str(latest(tmp_path))
    again.delete_all()


def test_manifest_has_digest_and_size_of_every_file(tmp_path: Path) -> None:
    """Digests by sha256sum of coreutils on the same bytes would be the same: sha256 of the empty input is well known."""
    import subprocess

    Saver(tmp_path).save(1)
    manifest = json.loads((latest(tmp_path) / "manifest.json").read_text())
    assert set(manifest) == {"actor/engine-00000.safetensors", "state.json"}
    for name, (sha256, size) in manifest.items():
        said = subprocess.run(["sha256sum", latest(tmp_path) / name], capture_output=True, text=True, check=True)
        assert said.stdout.split()[0] == sha256
        assert (latest(tmp_path) / name).stat().st_size == size


def test_latest_checkpoint_is_restored_and_the_latest_are_kept(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2)
    for step in (9, 10, 100):
        saver.save(step)
    assert steps(tmp_path) == ["step-00000010", "step-00000100"]
    assert Saver(tmp_path).restore() == ({"step": 100}, 100)


def test_step_may_be_saved_again(tmp_path: Path) -> None:
    Saver(tmp_path, keep=1).save(5, 1)
    Saver(tmp_path, keep=1).save(5, 1)
    assert steps(tmp_path) == ["step-00000005"]
    assert Saver(tmp_path).restore()[1] == 1


def test_skipped_checkpoint_is_deleted_after_the_next_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1)
    saver.save(3)
    break_byte(latest(tmp_path) / "state.json")
    again = Saver(tmp_path)
    assert again.restore() == ({"step": 1}, 1)
    again.save(2)
    assert steps(tmp_path) == ["step-00000001", "step-00000002"]


def break_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no marker": (lambda f: (f / COMPLETE).unlink(), "no .complete"),
    "a byte of the weights": (lambda f: break_byte(f / "actor/engine-00000.safetensors"), "sha256"),
    "a byte of the state": (lambda f: break_byte(f / "state.json"), "sha256"),
    "no weights": (lambda f: (f / "actor/engine-00000.safetensors").unlink(), "missing"),
    "short weights": (lambda f: (f / "actor/engine-00000.safetensors").write_bytes(b"x"), "has 1 bytes, expected"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text('{"state.json": ["'),
        "manifest.json cannot be read",
    ),
    "a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    "deep nesting": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json cannot be read"),
    "an empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), "lacks state.json"),
    "a way out": (lambda f: (f / "manifest.json").write_text('{"../../x": ["", 1]}'), "not a checkpoint file"),
    "a pickle": (lambda f: (f / "manifest.json").write_text('{"actor/engine.pt": ["", 1]}'), "not a checkpoint file"),
    "a link": (
        lambda f: (f / "state.json").rename(f.parent / "s") and (f / "state.json").symlink_to(f.parent / "s"),
        "state.json is reached through a symbolic link",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_checkpoint_that_does_not_verify_is_skipped_with_a_reason(tmp_path: Path, what: str) -> None:
    damage, why = BREAKS[what]
    saver = Saver(tmp_path)
    saver.save(1)
    saver.save(2)
    damage(latest(tmp_path))
    again = Saver(tmp_path)
    assert again.restore() == ({"step": 1}, 1)
    (said,) = again.said
    assert said.startswith(f"checkpoint {latest(tmp_path).name} is skipped: ")
    assert why in said


def test_training_starts_over_when_no_checkpoint_verifies(tmp_path: Path) -> None:
    Saver(tmp_path).save(1)
    (latest(tmp_path) / COMPLETE).unlink()
    again = Saver(tmp_path)
    assert again.restore() == (None, -1)
    assert len(again.said) == 1
    again.save(1)  # interrupted checkpoints are deleted
    assert len(list((tmp_path / "ppo" / "abc").glob("step-*"))) == 1


@pytest.mark.parametrize("name", ["state.json", "manifest.json", COMPLETE])
def test_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, name: str) -> None:
    Saver(tmp_path).save(1)
    failing = Saver(Broken(tmp_path, name))
    failing.save(2)
    assert failing.said == [
        "a checkpoint could not be written; training continues without it ([Errno 28] No space left on device)"
    ]
    assert Saver(tmp_path).restore() == ({"step": 1}, 1)


def test_failed_save_is_reported_after_the_next_step(tmp_path: Path) -> None:
    failing = Saver(Broken(tmp_path, COMPLETE))
    for step in (1, 2, 3):
        failing.folder.save(step, {"actor": Counter(step)}, {})
        writer = failing.folder._writer
        assert writer is not None
        writer.join()
        if step < 3:
            assert not failing.folder.should_save()
            assert len(failing.said) == step
    with pytest.raises(InputError, match="3 checkpoints in a row could not be written to ppo/abc"):
        failing.folder.should_save()


def test_repeated_save_failures_end_training(tmp_path: Path) -> None:
    failing = Saver(Broken(tmp_path, COMPLETE))
    failing.save(1)
    failing.save(2)
    with pytest.raises(InputError, match="3 checkpoints in a row could not be written to ppo/abc"):
        failing.save(3)


def test_successful_save_resets_the_failure_count(tmp_path: Path) -> None:
    store = Broken(tmp_path, COMPLETE)
    saver = Saver(store)
    for step in range(1, 10):
        store.name = "nothing" if step % 3 == 0 else COMPLETE
        saver.save(step)
    assert len(saver.said) == 6


def test_save_returns_before_the_disk_write_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    gate = threading.Event()
    write = files.write_checkpoint
    monkeypatch.setattr(files, "write_checkpoint", lambda *arguments: gate.wait(60) and write(*arguments))
    saver = Saver(tmp_path)
    actor = Counter(1)
    saver.folder.save(1, {"actor": actor}, {})
    actor.number += 100  # training continues while the write is blocked
    assert saver.folder.latest is None
    gate.set()
    saver.folder.wait()
    assert Saver(tmp_path).restore() == ({"step": 1}, 1)


def test_state_that_is_not_json_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Saver(tmp_path).folder.save(1, {"actor": Counter(1)}, {"no JSON": object()})
    assert not list(tmp_path.rglob(COMPLETE))


def test_restore_finds_nothing_in_an_empty_store_or_under_another_key(tmp_path: Path) -> None:
    assert Saver(tmp_path).restore() == (None, -1)
    Saver(tmp_path, key="ppo/abc").save(1)
    assert Saver(tmp_path, key="ppo/abd").restore() == (None, -1)


def test_delete_all_deletes_only_this_stage(tmp_path: Path) -> None:
    ours, others = Saver(tmp_path), Saver(tmp_path, key="sft/def")
    ours.save(1)
    others.save(1)
    ours.folder.delete_all()
    assert ours.restore() == (None, -1)
    assert others.restore() == ({"step": 1}, 1)
    ours.folder.delete_all()  # deleting twice is not an error


def test_manager_without_a_store_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saver = Saver(None, every_minutes=0.0)
    assert not saver.folder.should_save()
    saver.save(1)
    assert saver.restore() == (None, -1)
    saver.folder.delete_all()
    assert saver.folder.latest is None
    assert not list(tmp_path.iterdir())


def test_should_save_every_given_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(manager.time, "monotonic", lambda: now)
    saver = Saver(tmp_path, every_minutes=2.0)
    assert not saver.folder.should_save()
    now += 119
    assert not saver.folder.should_save()
    now += 1
    assert saver.folder.should_save()
    saver.save(1)
    assert not saver.folder.should_save()
    now += 120
    assert saver.folder.should_save()


def test_signal_saves_a_checkpoint_and_ends_the_stage(tmp_path: Path) -> None:
    stop = StopSignal()
    saver = Saver(tmp_path, stop=stop)
    assert not saver.folder.should_save()
    stop.signal = 15
    assert saver.folder.should_save()
    with pytest.raises(SystemExit) as end:
        saver.save(4)
    assert end.value.code == 143
    assert saver.said == ["saved step 4 and exiting on SIGTERM; the stage resumes from it when started again"]
    assert Saver(tmp_path).restore() == ({"step": 4}, 4)


def test_shards_of_several_ranks_form_one_checkpoint(tmp_path: Path) -> None:
    """Rank 0 waits for the digests of the other ranks, and its manifest names all shards."""
    import threading

    store = FolderStore(tmp_path)
    shares = [files.Shards(rank, 2, {"actor": {"number": torch.tensor(rank)}}) for rank in (0, 1)]
    first = threading.Thread(
        target=files.write_checkpoint, args=(store, "k/step-00000001-00000000", shares[0], '{"step": 1}')
    )
    first.start()
    first.join(0.5)
    assert first.is_alive()
    assert not files.is_complete(store, "k/step-00000001-00000000")
    files.write_checkpoint(store, "k/step-00000001-00000000", shares[1], "")
    first.join(10)
    local, state = files.fetch_checkpoint(store, "k/step-00000001-00000000", tmp_path / "unused")
    assert state == {"step": 1}
    assert [int(load_file(local / f"actor/engine-0000{rank}.safetensors")["number"]) for rank in (0, 1)] == [0, 1]


def test_failed_shard_fails_the_checkpoint(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("k/step-00000001-00000000/shards-00001.json", b'{"error": "disk full"}')
    with pytest.raises(InputError, match="another rank could not write its shards: disk full"):
        files.write_checkpoint(store, "k/step-00000001-00000000", files.Shards(0, 2, {}), "{}")
    assert not files.is_complete(store, "k/step-00000001-00000000")


class Remote:
    """A store whose files must be downloaded."""

    def __init__(self, folder: Path) -> None:
        self.store, self.uri = FolderStore(folder), "s3://bucket"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class SecondNode(SingleProcess):
    """Rank 1, alone on another node than rank 0, whose temporary folder does not exist here."""

    rank, world_size = 1, 2

    def __init__(self, store: Remote) -> None:
        self.store = store

    def gather(self, items: Any) -> list[Any]:
        if not items:  # rank 0 lists the checkpoints
            return files.list_checkpoints(self.store, "ppo/x")  # type: ignore[arg-type]
        return [(0, "/folder/of/rank/0") if isinstance(items[0], tuple) else items[0], *items]


def test_each_node_downloads_to_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = Remote(tmp_path)
    first = CheckpointManager(store, "ppo/x", CheckpointConfig(every_minutes=0))
    first.save(7, {"actor": Counter(42)}, {"kl_coef": 0.5})
    first.wait()
    monkeypatch.setenv("GROUP_RANK", "1")
    engine, group = Counter(), SecondNode(store)
    state = CheckpointManager(store, "ppo/x", CheckpointConfig(), group).restore({"actor": engine})
    assert state == {"step": 7, "kl_coef": 0.5} and engine.number.item() == 42
    assert not Path("/folder").exists()
