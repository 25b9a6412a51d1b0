"""What a run has spent over all attempts and stages, and the end of a stage at its budget: run, raise, resume."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from components.rlhf.artifacts.manifest import read_manifest
from components.rlhf.checkpoints import spend
from components.rlhf.checkpoints.run import mark_run
from components.rlhf.checkpoints.spend import Ledger, read_spend, set_budget
from components.rlhf.storage.store import FolderStore
from components.rlhf.text.errors import InputError
from components.sft.__main__ import main as sft
from pipelines.__main__ import cli
from tests.support.node_inputs import options, sft_settings, write_inputs

FOLDER = "run-r/spend"


def write(root: Path, name: str, **content: Any) -> None:
    path = root / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def ledger(root: Path, stage: str = "ppo", *, seconds: float = 0.0, **changes: Any) -> Ledger:
    """The ledger of an attempt that has run for so many seconds, at a price of 3,600 per hour: one per second."""
    numbers = dict(budget=500.0, price_per_hour=3600.0) | changes
    return Ledger(FolderStore(root), "r", stage, started=time.monotonic() - seconds, **numbers)


def test_spend_is_the_sum_over_attempts_and_stages(tmp_path: Path) -> None:
    write(tmp_path, "sft-1.json", stage="sft", price_per_hour=40, seconds=9000)  # 100
    write(tmp_path, "sft-2.json", stage="sft", price_per_hour=40, seconds=1800)  # 20, another attempt
    write(tmp_path, "ppo-1.json", stage="ppo", price_per_hour=80, seconds=13500)  # 300
    own = ledger(tmp_path, seconds=79.0)
    own.open()
    assert own.spent() == pytest.approx({"sft": 120, "ppo": 379}, abs=0.9)
    assert not own.is_exhausted()
    own.started -= 2
    assert own.is_exhausted()
    message = own.message("KEPT")
    own.close()
    assert message.startswith("cluster.budget is 500, and this run has spent 501.")
    assert "(sft 120.00, ppo 381." in message and "; KEPT. To go on, resume with: kfp-rlhf run --resume DIR" in message
    assert f"kfp-rlhf budget {tmp_path}/run-r AMOUNT" in message
    spent, _ = read_spend(FolderStore(tmp_path), FOLDER, 1.0)
    assert spent == pytest.approx({"sft": 120, "ppo": 381}, abs=0.9)


def test_running_attempt_is_written_and_sees_other_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed attempt counts, and two stages that run at the same time share one budget."""
    monkeypatch.setattr(spend, "WRITE_SECONDS", 0.05)
    first, second = ledger(tmp_path, "reward_model", seconds=300), ledger(tmp_path, "judge_reward_model", seconds=300)
    first.open()
    assert not first.is_exhausted()
    second.open()
    deadline = time.monotonic() + 10
    while not first.is_exhausted() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert first.is_exhausted()  # 600 of 500
    second.started -= 1000
    while (
        read_spend(FolderStore(tmp_path), FOLDER, 1.0)[0]["judge_reward_model"] < 1300 and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    assert read_spend(FolderStore(tmp_path), FOLDER, 1.0)[0]["judge_reward_model"] >= 1300
    for open_ledger in (first, second):
        open_ledger.close()
        open_ledger.close()


def test_budget_that_was_set_later_replaces_the_one_of_the_settings(tmp_path: Path) -> None:
    mark_run(FolderStore(tmp_path), "r")
    write(tmp_path, "sft-1.json", stage="sft", price_per_hour=3600, seconds=600)
    assert set_budget(FolderStore(tmp_path), "run-r", 800.0) == 600
    own = ledger(tmp_path)
    own.open()
    assert own.budget == 800 and not own.is_exhausted()
    own.close()


def test_budget_is_set_on_the_command_line(tmp_path: Path) -> None:
    mark_run(FolderStore(tmp_path), "r")
    done = CliRunner().invoke(cli, ["budget", f"{tmp_path}/run-r/", "800"])
    assert done.output == "the budget of run-r is 800; 0.00 has been spent\n"
    assert json.loads((tmp_path / FOLDER / "budget.json").read_text()) == {"budget": 800}


@pytest.mark.parametrize("folder", ["run-x", "run-r/spend", "."])
def test_budget_of_a_folder_that_is_no_run_is_refused(tmp_path: Path, folder: str) -> None:
    mark_run(FolderStore(tmp_path), "r")
    with pytest.raises(InputError, match="is not the folder of a run's checkpoints"):
        set_budget(FolderStore(tmp_path), folder, 800.0)
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"stage": "sft"}', '{"stage": "sft", "price_per_hour": "1", "seconds": 1}',
     '{"stage": "sft", "price_per_hour": 1, "seconds": -5}', '{"stage": "sft", "price_per_hour": 1, "seconds": 1e999}'],
)  # fmt: skip
def test_unreadable_spend_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path, "sft-1.json")
    (tmp_path / FOLDER / "sft-1.json").write_text(content)
    with pytest.raises(InputError, match=r"run-r/spend/sft-1.json is not a file of what the run has spent"):
        ledger(tmp_path).open()


# --- a stage ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def train(inputs: Path, folder: Path, capsys: pytest.CaptureFixture[str], **budget: float) -> tuple[int, str]:
    """Run SFT; its exit code, and what it has printed."""
    settings = json.dumps(json.loads(sft_settings(1)) | ({"budget": budget} if budget else {}))
    code = 0
    try:
        sft.main(list(options("sft", settings, inputs, folder / "out", folder / "checkpoints")), standalone_mode=False)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err


def test_stage_ends_at_its_budget_and_resumes_with_a_higher_one(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RUN_ID", "r")
    whole, own = tmp_path / "whole", tmp_path / "own"
    assert train(inputs, whole, capsys)[0] == 0
    write(own / "checkpoints", "import-1.json", stage="reward_model", price_per_hour=3600, seconds=99.9)
    cheap = {"price_per_hour": 36.0, "limit": 109.0}
    is_exhausted, asked = Ledger.is_exhausted, []

    def hours_later(self: Ledger) -> bool:
        """The first step takes 1,000 seconds, so that this stage spends 10."""
        asked.append(self)
        self.started -= 1000.0 if len(asked) == 2 else 0.0
        return is_exhausted(self)

    monkeypatch.setattr(Ledger, "is_exhausted", hours_later)
    code, said = train(inputs, own, capsys, **cheap)
    assert code == 1
    (kept,) = (own / "checkpoints").glob("run-r/sft/*/step-00000001-*")
    error = said[said.index("error: ") :]
    assert error.startswith("error: cluster.budget is 109, and this run has spent 109.9")
    assert "(reward_model 99.90, sft 10." in error
    assert f"the checkpoint after step 1 is kept in {kept}. To go on" in error
    assert (kept / ".complete").is_file() and not (own / "out").exists()
    assert not list((own / "checkpoints").rglob("lease.json"))

    code, again = train(inputs, own, capsys, **cheap)  # a retry ends at once, without a step
    assert code == 1
    assert f"the checkpoint after step 1 is kept in {kept}" in again and "resuming" not in again
    assert list((own / "checkpoints").glob("run-r/sft/*/step-*")) == [kept]

    code, said = train(inputs, own, capsys, price_per_hour=36.0, limit=120.0)
    assert code == 0 and "resuming after step 1" in said
    models = [read_manifest(folder / "out" / "model") for folder in (whole, own)]
    assert models[0].digest == models[1].digest  # weights, settings and metrics
    assert not list((own / "checkpoints").rglob("step-*"))
    spent, _ = read_spend(FolderStore(own / "checkpoints"), FOLDER, 1.0)  # counts for the stages after it
    assert spent["reward_model"] == pytest.approx(99.9) and spent["sft"] == pytest.approx(10, abs=2)


def test_budget_without_checkpoints_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.dumps(json.loads(sft_settings(1)) | {"budget": {"limit": 1}})
    arguments = list(options("sft", settings, inputs, tmp_path / "out", tmp_path))
    arguments[arguments.index("--storage") + 1] = "{}"
    with pytest.raises(SystemExit):
        sft.main(arguments, standalone_mode=False)
    assert "error: budget.limit is set, but storage.checkpoint_uri is not" in capsys.readouterr().err
