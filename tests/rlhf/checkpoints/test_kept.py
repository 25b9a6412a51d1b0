"""States that are kept beside checkpoints: one per name, found again by every checkpoint that names it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.group import SingleProcess
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.errors import InputError
from tests.rlhf.checkpoints.test_manager import Broken, Counter, Saver, break_byte

T = TypeVar("T")


def keep(saver: Saver, step: int, name: str = "best", number: int | None = None) -> None:
    saver.folder.keep(name, step, {"actor": Counter(step if number is None else number)}, {"kl": step / 2})


def loaded(saver: Saver, name: str = "best") -> tuple[dict[str, Any], int]:
    actor = Counter(-1)
    return saver.folder.load_kept(name, {"actor": actor}), int(actor.number)


def folders(root: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (root / "ppo" / "abc").iterdir() if path.is_dir())


def test_latest_state_of_each_name_is_kept(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    assert saver.folder.kept("best") is None
    for step in (1, 3):
        keep(saver, step)
    keep(saver, 2, "good", 20)
    assert (saver.folder.kept("best"), saver.folder.kept("good")) == (3, 2)
    assert loaded(saver) == ({"step": 3, "kl": 1.5}, 3)
    assert loaded(saver, "good") == ({"step": 2, "kl": 1.0}, 20)
    assert folders(tmp_path) == ["best-00000003", "good-00000002"]
    saver.folder.delete_all()
    assert not list((tmp_path / "ppo").rglob("best*"))


def test_checkpoint_finds_the_state_that_was_kept_when_it_was_written(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    keep(saver, 1)
    saver.save(2, history=[0.5])
    keep(saver, 3)
    keep(saver, 4)
    assert saver.folder.kept("best") == 4
    # 3 was of no checkpoint; a run that resumes from step 2 needs 1.
    assert folders(tmp_path) == ["best-00000001", "best-00000004", "step-00000002"]
    again = Saver(tmp_path)
    assert again.restore() == ({"step": 2, "history": [0.5]}, 2)
    assert again.folder.kept("best") == 1
    assert loaded(again) == ({"step": 1, "kl": 0.5}, 1)
    keep(again, 3)
    again.save(3)
    assert folders(tmp_path) == ["best-00000001", "best-00000003", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("resumes", [False, True])
def test_states_are_deleted_with_the_last_checkpoint_that_names_them(tmp_path: Path, resumes: bool) -> None:
    saver = Saver(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        keep(saver, step)
        saver.save(step)
        if resumes:
            saver.folder.kept("best")
            saver = Saver(tmp_path, keep=2)
            saver.restore()
    assert folders(tmp_path) == ["best-00000003", "best-00000004", "step-00000003", "step-00000004"]


def test_checkpoint_that_is_skipped_takes_its_state_along(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    for step in (1, 2):
        keep(saver, step)
        saver.save(step)
    break_byte(max((tmp_path / "ppo" / "abc").glob("step-*")) / "state.json")
    again = Saver(tmp_path)
    assert again.restore() == ({"step": 1}, 1)
    assert loaded(again) == ({"step": 1, "kl": 0.5}, 1)


@pytest.mark.parametrize("name", ["state.json", "manifest.json", ".complete"])
def test_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, name: str) -> None:
    store = Broken(tmp_path, "nothing")
    saver = Saver(store)
    keep(saver, 1)
    assert saver.folder.kept("best") == 1
    store.name = name
    keep(saver, 2)
    assert saver.folder.kept("best") == 1
    assert "could not be written; training continues without it" in saver.said[0]
    assert loaded(saver) == ({"step": 1, "kl": 0.5}, 1)
    store.name = "nothing"
    keep(saver, 3)
    assert saver.folder.kept("best") == 3
    assert folders(tmp_path) == ["best-00000003"]


def test_damaged_state_is_an_error_that_names_it(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    keep(saver, 7)
    saver.folder.wait()
    (folder,) = (tmp_path / "ppo" / "abc").glob("best-*")
    break_byte(folder / "actor" / "engine-00000.safetensors")
    with pytest.raises(InputError, match=rf"{folder}: the sha256 of actor/engine-00000.safetensors does not match"):
        loaded(saver)
    with pytest.raises(InputError, match="has no kept state good"):
        loaded(saver, "good")


FOREIGN = ["../../other", "step-00000001-00000000", "good-00000001-00000000", 3, None, ["x"]]


@pytest.mark.parametrize("kept", [*({"best": value} for value in FOREIGN), [], "best", 3, None])
def test_checkpoint_cannot_name_a_folder_that_is_no_state_of_its_own(tmp_path: Path, kept: Any) -> None:
    saver = Saver(tmp_path)
    saver.save(1, kept=kept)
    again = Saver(tmp_path)
    assert again.restore() == ({"step": 1}, 1)
    assert again.folder.kept("best") is None


def test_run_without_a_store_keeps_states_in_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    saver = Saver(None)
    assert saver.folder.can_keep and list(tmp_path.iterdir()) == []
    for step in (1, 2):
        keep(saver, step)
    assert loaded(saver) == ({"step": 2, "kl": 1.0}, 2)
    assert len(list(tmp_path.iterdir())) == 1
    saver.folder.release()
    assert list(tmp_path.iterdir()) == []


class Watching(SingleProcess):
    """A group that notes whether a state is still being written whenever the ranks meet."""

    def __init__(self) -> None:
        self.manager: CheckpointManager | None = None
        self.busy: list[bool] = []

    def gather(self, items: Sequence[T]) -> list[T]:
        assert self.manager is not None
        self.busy.append(self.manager._writer is not None)
        return list(items)


def test_no_rank_writes_to_a_new_folder_while_rank_0_still_deletes(tmp_path: Path) -> None:
    """Other ranks know the name of the next folder once all have met, and rank 0 deletes folders that it does not know."""
    group = Watching()
    group.manager = CheckpointManager(FolderStore(tmp_path), "ppo/abc", CheckpointConfig(), group)
    for step in (1, 2, 3):
        group.manager.keep("best", step, {"actor": Counter(step)}, {})
        group.manager.save(step, {"actor": Counter(step)}, {})
    group.manager.kept("best")
    assert len(group.busy) == 7 and not any(group.busy)


def test_kept_state_is_no_checkpoint(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    keep(saver, 5)
    saver.folder.wait()
    assert saver.folder.latest is None
    assert Saver(tmp_path).restore() == (None, -1)
    text = next((tmp_path / "ppo" / "abc").glob("best-*/state.json")).read_text()
    assert json.loads(text) == {"step": 5, "kl": 2.5}
    assert CheckpointManager(None, "k", CheckpointConfig()).kept("best") is None
