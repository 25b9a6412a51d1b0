import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from components.rlhf.checkpoints import folder as folder_module
from components.rlhf.checkpoints.folder import COMPLETE, CheckpointFolder
from components.rlhf.config.storage import CheckpointSettings
from components.rlhf.engine.protocol import StepInfo


class Counter:
    """An engine that keeps one number."""

    module = nn.Identity()

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def backward(self, loss: Tensor, last: bool) -> None: ...

    def step(self) -> StepInfo:
        raise NotImplementedError

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "number", torch.tensor(self.number)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "number").write_text(str(self.number))

    def load(self, directory: Path) -> None:
        self.number = int((directory / "number").read_text())


class Broken(Counter):
    def save(self, directory: Path) -> None:
        super().save(directory)
        raise OSError("no space left on device")


def folder_in(
    root: Path | None, *, key: str = "ppo/abc", keep: int = 2, every_minutes: float = 5.0
) -> CheckpointFolder:
    return CheckpointFolder(root, key, CheckpointSettings(keep=keep, every_minutes=every_minutes))


def names(folder: CheckpointFolder) -> list[str]:
    assert folder.folder is not None
    return sorted(path.name for path in folder.folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    state = {"kl_coef": 0.1 + 0.2, "history": [{"a": 1.5}], "best": None}
    folder_in(tmp_path).save(7, {"actor": Counter(3), "critic": Counter(4)}, state)
    actor, critic = Counter(), Counter()
    folder = folder_in(tmp_path)
    assert folder.newest is None
    assert folder.restore({"actor": actor, "critic": critic}) == {"step": 7, **state}
    assert (actor.number, critic.number) == (3, 4)
    assert folder.newest == tmp_path / "ppo" / "abc" / "step-00000007"


def test_the_newest_counts_and_the_newest_are_kept(tmp_path: Path) -> None:
    folder = folder_in(tmp_path, keep=2)
    for step in (9, 10, 100):
        folder.save(step, {"actor": Counter(step)}, {})
        assert folder.newest is not None
        assert folder.newest.name == f"step-{step:08d}"
    assert names(folder) == ["step-00000010", "step-00000100"]
    actor = Counter()
    assert folder_in(tmp_path).restore({"actor": actor}) == {"step": 100}
    assert actor.number == 100


def test_a_step_is_saved_again_in_place(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    folder.save(5, {"actor": Counter(1)}, {"try": 1})
    folder.save(5, {"actor": Counter(2)}, {"try": 2})
    actor = Counter()
    assert folder.restore({"actor": actor}) == {"step": 5, "try": 2}
    assert actor.number == 2
    assert names(folder) == ["step-00000005"]


def test_an_incomplete_one_is_ignored(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    folder.save(1, {"actor": Counter(1)}, {})
    folder.save(2, {"actor": Counter(2)}, {})
    (tmp_path / "ppo" / "abc" / "step-00000002" / COMPLETE).unlink()
    actor = Counter()
    assert folder_in(tmp_path).restore({"actor": actor}) == {"step": 1}
    assert actor.number == 1


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    folder.save(1, {"actor": Counter(1)}, {})
    with pytest.raises(OSError, match="no space"):
        folder.save(2, {"actor": Broken(2)}, {})
    assert folder.newest is not None
    assert folder.newest.name == "step-00000001"
    actor = Counter()
    assert folder_in(tmp_path).restore({"actor": actor}) == {"step": 1}
    folder.save(2, {"actor": Counter(2)}, {})  # what the failed one left is swept away
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_the_marker_is_the_last_thing_written(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    with pytest.raises(TypeError):
        folder.save(1, {"actor": Counter(1)}, {"no JSON": object()})
    assert folder_in(tmp_path).restore({"actor": Counter()}) is None
    assert not list(tmp_path.rglob(COMPLETE))


def test_nothing_is_found_in_an_empty_folder_or_under_another_key(tmp_path: Path) -> None:
    assert folder_in(tmp_path).restore({"actor": Counter()}) is None
    folder_in(tmp_path, key="ppo/abc").save(1, {"actor": Counter(1)}, {})
    assert folder_in(tmp_path, key="ppo/abd").restore({"actor": Counter()}) is None


def test_clear_deletes_this_stage_alone(tmp_path: Path) -> None:
    ours, others = folder_in(tmp_path), folder_in(tmp_path, key="sft/def")
    ours.save(1, {"actor": Counter(1)}, {})
    others.save(1, {"actor": Counter(2)}, {})
    ours.clear()
    assert ours.restore({"actor": Counter()}) is None
    assert others.restore({"actor": Counter()}) == {"step": 1}
    ours.clear()  # twice is no error


def test_without_a_root_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_in(None, every_minutes=0.0)
    assert not folder.due()
    folder.save(1, {"actor": Counter(1)}, {})
    assert folder.restore({"actor": Counter()}) is None
    folder.clear()
    assert folder.newest is None
    assert not list(tmp_path.iterdir())


def test_due_every_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: now)
    folder = folder_in(tmp_path, every_minutes=2.0)
    assert not folder.due()
    now += 119
    assert not folder.due()
    now += 1
    assert folder.due()
    folder.save(1, {"actor": Counter(1)}, {})
    assert not folder.due()
    now += 120
    assert folder.due()


def test_always_due_when_minutes_are_zero(tmp_path: Path) -> None:
    assert folder_in(tmp_path, every_minutes=0.0).due()


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    folder = folder_in(tmp_path)
    folder.save(3, {"actor": Counter(1)}, {"kl_coef": 0.25})
    assert folder.newest is not None
    assert json.loads((folder.newest / "state.json").read_text()) == {"step": 3, "kl_coef": 0.25}
