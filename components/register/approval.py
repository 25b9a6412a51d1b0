"""Waits until a person approves or rejects, in MLflow or in the run directory of a run on this machine.

KFP v2 has no task that is suspended: register waits itself, on a fraction of a CPU. Its request survives it: another attempt, or the
resumed run, waits for the rest of the time, and an answer that was given meanwhile counts.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.answers import warn
from components.rlhf.tracking.approvals import (
    DIGEST,
    PENDING,
    REQUESTED,
    STATE,
    Answer,
    answer_in,
    forget_other_answer,
    parse_timestamp,
    request_approval,
    tags_of_run,
    timestamp,
)

FILE_VARIABLE = "RLHF_APPROVAL_FILE"  # of a run on this machine: the file in its directory
POLL_SECONDS, RETRY_SECONDS = 5.0, 60.0
REMINDERS = (0.5, 0.9)  # after these shares of the time


class Channel(Protocol):
    """A place where a person can answer."""

    how: str  # to answer, as part of a sentence

    def request(self, now: float) -> float | None:
        """Ask there; return when that was first done, or None if the place cannot be reached now."""

    def read(self, now: float) -> tuple[Answer | None, str]:
        """The answer, and what is wrong with one that does not count. No answer if the place cannot be reached."""


@dataclass
class ApprovalFile:
    """approval.json in the run directory. An answer about another policy does not count."""

    path: Path
    digest: str
    facts: Mapping[str, str] = field(default_factory=dict)  # for the person: the verdict, and where the report is

    @property
    def how(self) -> str:
        return f"kfp-rlhf approve {self.path.parent} --by NAME --why TEXT (--reject rejects)"

    def request(self, now: float) -> float | None:
        content = self._content()
        requested = parse_timestamp(content.get(REQUESTED, ""))
        if requested is None:
            content = {STATE: PENDING, DIGEST: self.digest, REQUESTED: timestamp(now), **self.facts}
            write_json(self.path, content)
            requested = now
        return requested

    def read(self, now: float) -> tuple[Answer | None, str]:
        return answer_in(self._content(), now)

    def finish(self, answer: Answer) -> None:
        write_json(self.path, self._content() | answer.tags())

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and content.get(DIGEST) == self.digest else {}


@dataclass
class RegisteredVersion:
    """The tags of the version in MLflow. register registers it as a candidate, and returns its number, or "" if MLflow failed."""

    tracking: TrackingConfig
    run_id: str
    digest: str
    register: Callable[[], str]
    version: str = ""
    _next_try: float = 0.0

    @property
    def how(self) -> str:
        name = f"version {self.version} of {self.tracking.registered_model}" if self.version else "the version"
        return f"set the tags approval (approved or rejected), approved_by and approval_reason of {name} in MLflow"

    def request(self, now: float) -> float | None:
        if now < self._next_try:
            return None
        try:
            forget_other_answer(self.tracking, self.run_id, self.digest)
            self.version = self.register()
            if self.version:
                return request_approval(self.tracking, self.version, now)
        except Exception as error:  # MLflow must not fail a run
            self.version = ""
            warn(error, self.tracking)
        self._next_try = now + RETRY_SECONDS
        return None

    def read(self, now: float) -> tuple[Answer | None, str]:
        if now < self._next_try or (not self.version and self.request(now) is None):
            return None, ""
        try:
            return answer_in(tags_of_run(self.tracking, self.run_id), now)
        except Exception as error:  # MLflow must not fail a run
            warn(error, self.tracking)
            self._next_try = now + RETRY_SECONDS
            return None, ""


def wait_for_approval(
    channels: Sequence[Channel],
    hours: float,
    tell: Callable[[str, bool], None],
    *,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Answer:
    """The first answer in any of the channels, or after the time limit a rejection.

    tell is called with the text of the request and of each reminder, and with False for an answer that does not count.
    """
    now = clock()
    requested = min((at for channel in channels if (at := channel.request(now)) is not None), default=now)
    until, said = requested + 3600 * hours, set[str]()
    reminders = [requested + share * 3600 * hours for share in REMINDERS]
    due = [requested, *reminders]
    due = due if now == requested else [at for at in reminders if at > now]
    while True:
        now = clock()
        for channel in channels:
            answer, problem = channel.read(now)
            if answer is not None:
                return answer
            if problem and problem not in said:
                said.add(problem)
                tell(problem, False)
        if now >= until:
            return Answer(approved=False, by="", why=f"not approved within {hours:g} hours", at=timestamp(now))
        if due and now >= due[0]:
            due = [at for at in due if at > now]
            how = ", or ".join(channel.how for channel in channels)
            tell(f"waits for approval until {timestamp(until)}. To answer, {how}", True)
        sleep(max(0.0, min(POLL_SECONDS, until - now)))


def approval_file(digest: str, facts: Mapping[str, str]) -> ApprovalFile | None:
    """The file of a run on this machine."""
    path = os.environ.get(FILE_VARIABLE)
    return ApprovalFile(Path(path), digest, {name: redact(value) for name, value in facts.items()}) if path else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.writing")
    draft.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def warn_of(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr, flush=True)
