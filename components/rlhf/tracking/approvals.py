"""A person's approval of a registered version, as tags of the version.

Whoever may change tags in MLflow sets `approval` to approved or rejected, `approved_by` to a name, and `approval_reason`, in MLflow's UI,
with its API, or with `kfp-rlhf approve`. MLflow does not record who set a tag: the name is what the person says.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.registry import CHAMPION, find_version
from components.rlhf.tracking.runs import connect

STATE, BY, WHY, AT, REQUESTED = "approval", "approved_by", "approval_reason", "approved_at", "approval_requested_at"
PENDING, APPROVED, REJECTED = "pending", "approved", "rejected"
DIGEST = "digest"  # of the policy, a tag of every version


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was decided. by is empty if nobody answered in time."""

    approved: bool
    by: str
    why: str
    at: str  # ISO 8601, UTC

    def tags(self) -> dict[str, str]:
        """The tags of a version with this answer."""
        found = {STATE: APPROVED if self.approved else REJECTED, BY: self.by, WHY: self.why, AT: self.at}
        return {name: value for name, value in found.items() if value}

    def __str__(self) -> str:
        if not self.by:
            return self.why
        return f"{APPROVED if self.approved else REJECTED} by {self.by}" + (f": {self.why}" if self.why else "")


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def parse_timestamp(text: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, TypeError):
        return None


def answer_in(tags: Mapping[str, str], now: float) -> tuple[Answer | None, str]:
    """The answer in the tags of a version or the fields of a file, or None; and what is wrong with an answer that does not count."""
    state, by = str(tags.get(STATE) or "").strip().lower(), str(tags.get(BY) or "").strip()
    if state in ("", PENDING):
        return None, ""
    if state not in (APPROVED, REJECTED):
        return None, f"{STATE} is {state[:40]!r}; it must be {APPROVED} or {REJECTED}"
    # A rejection without a name is that of an earlier attempt of the stage, after the time limit.
    if not by and (state == APPROVED or not tags.get(AT)):
        return None, f"{STATE} is {state}, but {BY} is missing; set it to the name of the person who decides"
    why, at = str(tags.get(WHY) or "").strip(), str(tags.get(AT) or "") or timestamp(now)
    return Answer(approved=state == APPROVED, by=by, why=why, at=at), ""


def forget_other_answer(tracking: TrackingConfig, run_id: str, digest: str) -> None:
    """Remove request, answer, decision and alias from the version of a run, if they are about another policy. Raises MLflow's errors."""
    client = connect(str(tracking.uri))
    version = find_version(client, tracking.registered_model, run_id)
    if version is None or version.tags.get(DIGEST) == digest:
        return
    aliases = client.get_registered_model(tracking.registered_model).aliases
    if str(aliases.get(CHAMPION, "")) == str(version.version):  # nobody has approved of this policy
        client.delete_registered_model_alias(tracking.registered_model, CHAMPION)
    for tag in (STATE, BY, WHY, AT, "decision", "reason", REQUESTED):
        if tag in version.tags:
            client.delete_model_version_tag(tracking.registered_model, version.version, tag)


def request_approval(tracking: TrackingConfig, version: str, now: float) -> float:
    """Mark a version as waiting, unless it is; return when that was first done, in seconds since the epoch. Raises MLflow's errors."""
    client, name = connect(str(tracking.uri)), tracking.registered_model
    requested = parse_timestamp(client.get_model_version(name, version).tags.get(REQUESTED, ""))
    if requested is not None:
        return requested
    client.set_model_version_tag(name, version, STATE, PENDING)
    client.set_model_version_tag(name, version, REQUESTED, timestamp(now))
    return now


def tags_of_run(tracking: TrackingConfig, run_id: str) -> Mapping[str, str]:
    """The tags of the version that a run has registered; {} if there is none. Raises MLflow's errors."""
    version = find_version(connect(str(tracking.uri)), tracking.registered_model, run_id)
    return dict(version.tags) if version is not None else {}


def approve_version(tracking: TrackingConfig, run_id: str, answer: Answer) -> str:
    """Set the answer for the version of a run, and return its number. Raises InputError if it does not wait for one."""
    try:
        client: Any = connect(str(tracking.uri))
        version = find_version(client, tracking.registered_model, run_id)
        if version is None:
            raise InputError(
                f"The run {run_id[:80]} has no version of {tracking.registered_model} in MLflow; it does not wait for approval, or the "
                "address or the name of the model is another one."
            )
        require_pending(version.tags, f"Version {version.version} of {tracking.registered_model}")
        # The state is written last: with it the answer is complete.
        for name, value in reversed(answer.tags().items()):
            client.set_model_version_tag(tracking.registered_model, version.version, name, redact(value))
        return str(version.version)
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"MLflow could not be asked ({reason}); check the address and your permission.") from None


def require_pending(fields: Mapping[str, str], what: str) -> None:
    """Raise InputError unless the fields say that approval is waited for."""
    state, by = str(fields.get(STATE) or ""), str(fields.get(BY) or "")
    if not state:
        raise InputError(f"{what} needs no approval.")
    if state != PENDING:
        who = f" by {by}" if by else ""
        raise InputError(f"{what} was {state}{who} at {fields.get(AT, 'an unknown time')} already.")
