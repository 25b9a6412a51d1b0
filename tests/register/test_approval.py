"""A person's approval: the wait with a clock of its own, the places of an answer, and register as a whole with a real MLflow."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from components.register import approval
from components.register.__main__ import main
from components.register.approval import ApprovalFile, RegisteredVersion, wait_for_approval
from components.rlhf.artifacts.manifest import read_manifest, write_manifest
from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.errors import InputError
from components.rlhf.tracking import registry
from components.rlhf.tracking.approvals import Answer, answer_in, approve_version, parse_timestamp, timestamp
from components.rlhf.tracking.registry import register_version
from components.rlhf.tracking.texts import database_uri
from tests.support.mlflow_database import new_database
from tests.support.webhooks import webhook_server

HOUR = 3600.0
START = 1_700_000_000.0
YES = Answer(approved=True, by="Ann", why="read", at="2026-01-01T00:00:00+00:00")


@dataclass
class Place:
    """A channel that has an answer from some time on."""

    answer: Answer | None = None
    answered_at: float = START
    requested: float | None = START
    problem: str = ""
    how: str = "answer"

    def request(self, now: float) -> float | None:
        return self.requested

    def read(self, now: float) -> tuple[Answer | None, str]:
        return (self.answer if now >= self.answered_at else None), self.problem


@dataclass
class Clock:
    now: float = START
    told: list[tuple[float, str, bool]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += max(seconds, 0.001)

    def tell(self, text: str, is_request: bool) -> None:
        self.told.append(((self.now - START) / HOUR, text, is_request))

    def wait(self, *places: Any, hours: float = 10.0) -> Answer:
        return wait_for_approval(places, hours, self.tell, clock=self, sleep=self.sleep)


def test_nobody_answers_in_time() -> None:
    clock = Clock()
    answer = clock.wait(Place())
    assert (answer.approved, answer.by, str(answer)) == (False, "", "not approved within 10 hours")
    assert clock.now == pytest.approx(START + 10 * HOUR, abs=0.1)
    hours = [at for at, _, _ in clock.told]
    assert hours == [0.0, pytest.approx(5.0, abs=0.01), pytest.approx(9.0, abs=0.01)]
    assert all("until 2023-11-15T08:13:20+00:00" in text for _, text, _ in clock.told)


def test_answer_ends_the_wait_in_whichever_place_it_is_given() -> None:
    clock = Clock()
    assert clock.wait(Place(), Place(answer=YES, answered_at=START + HOUR)) == YES
    assert clock.now == pytest.approx(START + HOUR, abs=approval.POLL_SECONDS)
    assert len(clock.told) == 1
    # An answer in the last moment counts.
    assert Clock().wait(Place(answer=YES, answered_at=START + 10 * HOUR)) == YES


def test_another_attempt_waits_for_the_rest_of_the_time() -> None:
    clock = Clock(now=START + 6 * HOUR)
    assert not clock.wait(Place(), Place(requested=None)).approved
    assert clock.now == pytest.approx(START + 10 * HOUR, abs=0.1)
    assert [at for at, _, _ in clock.told] == [6.0, pytest.approx(9.0, abs=0.01)]  # the first may not have said it
    late = Clock(now=START + 11 * HOUR)
    assert late.wait(Place(answer=YES)) == YES  # given in time, while nobody waited
    assert Clock(now=START + 11 * HOUR).wait(Place()).why == "not approved within 10 hours"


def test_answer_that_does_not_count_is_said_once() -> None:
    clock = Clock()
    clock.wait(Place(problem="approved_by is missing"))
    assert [text for _, text, is_request in clock.told if not is_request] == ["approved_by is missing"]


@pytest.mark.parametrize(
    ("tags", "answer", "problem"),
    [
        ({}, None, ""),
        ({"approval": "pending", "approved_by": "Ann"}, None, ""),
        ({"approval": " Approved ", "approved_by": " Ann "}, Answer(approved=True, by="Ann", why="", at=timestamp(START)), ""),
        (
            {"approval": "rejected", "approved_by": "Ann", "approval_reason": "terse", "approved_at": "x"},
            Answer(approved=False, by="Ann", why="terse", at="x"),
            "",
        ),
        ({"approval": "approved"}, None, "approved_by is missing"),
        ({"approval": "approved", "approved_at": "x", "approval_reason": "no answer in time"}, None, "approved_by is missing"),
        ({"approval": "approved", "approved_by": "  "}, None, "approved_by is missing"),
        ({"approval": "yes", "approved_by": "Ann"}, None, "must be approved or rejected"),
    ],
)  # fmt: skip
def test_what_counts_as_an_answer(tags: dict[str, str], answer: Answer | None, problem: str) -> None:
    found, why = answer_in(tags, START)
    assert found == answer and problem in why and bool(why) == bool(problem)


def test_file_keeps_its_request_and_forgets_an_answer_about_another_policy(tmp_path: Path) -> None:
    path = tmp_path / "approval.json"
    file = ApprovalFile(path, "digest 1", {"verdict": "better"})
    assert file.request(START) == START and file.request(START + 60) == START
    assert json.loads(path.read_text())["verdict"] == "better"
    path.write_text(json.dumps(json.loads(path.read_text()) | YES.tags()))
    assert file.read(START)[0] == YES
    other = ApprovalFile(path, "digest 2")
    assert other.read(START) == (None, "")
    assert other.request(START + 60) == START + 60 and other.read(START + 60) == (None, "")
    path.write_text("{")
    assert other.read(START) == (None, "")


# --- MLflow ---


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=database_uri(new_database(tmp_path_factory.mktemp("approval"))), registered_model="toy")


def version_of(tracking: TrackingConfig, run_id: str, digest: str, folder: Path) -> RegisteredVersion:
    (folder / "MLmodel").write_text("{}")

    def register() -> str:
        return register_version(
            tracking, folder=folder, run_id=run_id, decision="", reason="", lineage={"digest": digest}
        )

    return RegisteredVersion(tracking, run_id, digest, register)


def test_version_waits_as_a_candidate_until_its_tags_say_otherwise(tracking: TrackingConfig, tmp_path: Path) -> None:
    place, client = version_of(tracking, "r1", "d1", tmp_path), MlflowClient(tracking.uri, tracking.uri)
    assert place.request(START) == START and place.read(START) == (None, "")
    tags = client.get_model_version("toy", place.version).tags
    assert tags["approval"] == "pending" and "decision" not in tags
    assert parse_timestamp(tags["approval_requested_at"]) == START
    model = client.get_registered_model("toy")
    assert {alias: str(version) for alias, version in model.aliases.items()} == {"candidate": place.version}
    assert approve_version(tracking, "r1", YES) == place.version
    assert place.read(START)[0] == YES

    again = version_of(tracking, "r1", "d1", tmp_path)  # another attempt
    assert again.request(START + HOUR) == START and again.read(START)[0] == YES
    client.set_registered_model_alias("toy", "champion", place.version)
    other = version_of(tracking, "r1", "d2", tmp_path)  # the run has trained another policy
    assert other.request(START + HOUR) == START + HOUR and other.read(START + HOUR) == (None, "")
    assert "approved_by" not in client.get_model_version("toy", place.version).tags
    assert "champion" not in client.get_registered_model("toy").aliases


def test_only_a_waiting_version_can_be_approved(tracking: TrackingConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no version of toy"):
        approve_version(tracking, "nobody", YES)
    version_of(tracking, "r2", "d", tmp_path).register()
    with pytest.raises(InputError, match="needs no approval"):
        approve_version(tracking, "r2", YES)
    version_of(tracking, "r3", "d", tmp_path).request(START)
    approve_version(tracking, "r3", YES)
    with pytest.raises(InputError, match=r"was approved by Ann at 2026-01-01T00:00:00\+00:00 already"):
        approve_version(tracking, "r3", Answer(approved=False, by="Bob", why="no", at=""))
    with pytest.raises(InputError, match="MLflow could not be asked"):
        approve_version(TrackingConfig(uri="sqlite:////nowhere/x.db"), "r3", YES)


def test_mlflow_that_fails_is_asked_again_and_never_approves(
    tracking: TrackingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, works = version_of(tracking, "r4", "d", tmp_path), []
    register = place.register
    place.register = lambda: register() if works else ""
    clock, approve = Clock(), threading.Event()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now > START + HOUR:
            works.append(True)
        if clock.now > START + 2 * HOUR and not approve.is_set():
            approve.set()
            approve_version(tracking, "r4", YES)

    # The number of attempts is what is tested: a poll of MLflow costs a tenth of a second here.
    answer = wait_for_approval([place], 3.0, clock.tell, clock=clock, sleep=lambda s: sleep(max(s, 300.0)))
    assert answer == YES
    capsys.readouterr()


# --- register as a whole ---


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    with webhook_server() as (address, messages):
        monkeypatch.setenv("RLHF_WEBHOOK_URL", f"{address}/secret")
        yield messages


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A policy, and its evaluation, which the gate would promote, with a report beside it."""
    policy, evaluation = tmp_path / "policy", tmp_path / "evaluation"
    policy.mkdir()
    evaluation.mkdir()
    (policy / "config.json").write_text("{}")
    model = write_manifest(policy, kind="policy_model", parents={"sft_model": "abc"})
    sample = {"prompt": "The film", "sft": {"num_tokens": 3}, "ppo": {"num_tokens": 4}}
    (evaluation / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    facts: dict[str, Any] = {"decision": "promote", "reason": "win rate 0.7", "method": "ppo"}
    write_manifest(evaluation, kind="evaluation", parents={"policy_model": model.digest}, facts=facts)
    (tmp_path / "report").write_text("<html>")
    return tmp_path


def register(
    inputs: Path, tracking: TrackingConfig, hours: float, meanwhile: Callable[[], None] | None = None
) -> Result:
    settings = {"decision": "promote", "approval": {"hours": hours, "preset": "toy", "ui_url": "http://kfp"}}
    thread = threading.Thread(target=meanwhile or (lambda: None))
    thread.start()
    arguments = ["--policy", inputs / "policy", "--evaluation", inputs / "evaluation", "--summary", inputs / "summary"]
    options = ["--settings", json.dumps(settings), "--tracking", tracking.canonical_json()]
    result = CliRunner().invoke(main, [*map(str, arguments), *options])
    thread.join()
    return result


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_APPROVAL_FILE", raising=False)
    monkeypatch.setattr(approval, "POLL_SECONDS", 0.05)


def wait_until_pending(tracking: TrackingConfig, run_id: str) -> None:
    from components.rlhf.tracking.approvals import tags_of_run

    deadline = time.monotonic() + 60
    while tags_of_run(tracking, run_id).get("approval_requested_at") is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_answer_that_mlflow_does_not_take_is_not_lost(
    inputs: Path, tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RUN_ID", "outage")
    works = registry.register_version

    def fails_at_the_end(*arguments: Any, **options: Any) -> str:
        return "" if options["decision"] in ("promote", "reject") else works(*arguments, **options)

    def approve() -> None:
        wait_until_pending(tracking, "outage")
        approve_version(tracking, "outage", YES)

    monkeypatch.setattr(registry, "register_version", fails_at_the_end)
    failed = register(inputs, tracking, 1, approve)
    assert failed.exit_code != 0 and "could not be written to MLflow" in failed.output
    monkeypatch.setattr(registry, "register_version", works)
    assert register(inputs, tracking, 1).exit_code == 0  # another attempt, which nobody is asked in
    client = MlflowClient(tracking.uri, tracking.uri)
    assert client.get_model_version_by_alias("toy", "champion").tags["approved_by"] == YES.by


@pytest.mark.parametrize(("approved", "title"), [(True, "Promoted to champion"), (False, "Rejected")])
def test_register_does_what_a_person_says_in_mlflow(
    inputs: Path, tracking: TrackingConfig, webhook: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *, approved: bool, title: str
) -> None:  # fmt: skip
    run_id = f"run-{approved}"
    monkeypatch.setenv("RLHF_RUN_ID", run_id)
    answer = Answer(approved=approved, by="Ann", why="I have read 20 answers", at="2026-01-02T00:00:00+00:00")

    def meanwhile() -> None:
        wait_until_pending(tracking, run_id)
        approve_version(tracking, run_id, answer)

    result = register(inputs, tracking, 1.0, meanwhile)
    assert result.exit_code == 0, result.output
    client = MlflowClient(tracking.uri, tracking.uri)
    found = [v for v in client.search_model_versions("name='toy'") if v.tags.get("rlhf.run_id") == run_id]
    (version,) = found
    state = "approved" if approved else "rejected"
    expected = answer.tags() | {"decision": "promote" if approved else "reject"}
    assert expected.items() <= version.tags.items()
    assert version.tags["reason"] == f"win rate 0.7; {state} by Ann: I have read 20 answers"
    champion = client.get_registered_model("toy").aliases.get("champion")
    assert (champion == version.version) == approved
    assert title in version.description and title in (inputs / "summary").read_text()
    assert "- approved by: Ann" in (inputs / "summary").read_text()
    (message,) = webhook
    assert message["status"] == "waiting" and message["run_id"] == run_id
    for part in (
        "waits for approval until",
        "win rate 0.7",
        f"http://kfp/#/runs/details/{run_id}",
        str(inputs / "report"),
    ):
        assert part in message["text"]


def test_time_limit_rejects_and_leaves_the_champion(
    inputs: Path, tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RUN_ID", "too-late")
    client = MlflowClient(tracking.uri, tracking.uri)
    before = client.get_registered_model("toy").aliases.get("champion")
    result = register(inputs, tracking, 0.5 / HOUR)
    assert result.exit_code == 0, result.output
    (version,) = [v for v in client.search_model_versions("name='toy'") if v.tags.get("rlhf.run_id") == "too-late"]
    assert version.tags["decision"] == "reject" and version.tags["approval"] == "rejected"
    assert "not approved within" in version.tags["reason"] and "approved_by" not in version.tags
    assert client.get_registered_model("toy").aliases.get("champion") == before


def test_without_mlflow_the_file_of_the_run_is_enough(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = TrackingConfig(enabled=False)
    result = register(inputs, off, 1.0)
    assert result.exit_code == 1 and "there is no MLflow where a person could approve" in result.output
    path = inputs / "approval.json"
    monkeypatch.setenv("RLHF_APPROVAL_FILE", str(path))

    def meanwhile() -> None:
        while not path.is_file():
            time.sleep(0.02)
        path.write_text(json.dumps(json.loads(path.read_text()) | YES.tags()))

    result = register(inputs, off, 1.0, meanwhile)
    assert result.exit_code == 0, result.output
    assert "Promoted to champion" in (inputs / "summary").read_text()
    assert json.loads(path.read_text())["digest"] == read_manifest(inputs / "policy").digest
    # Another attempt finds the answer, and waits for nobody.
    assert register(inputs, off, 1.0).exit_code == 0
