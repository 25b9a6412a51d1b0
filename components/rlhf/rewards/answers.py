"""Answers of endpoints to judges and rewards, kept by the digest of the request, so that none is paid for twice.

A process writes its answers to a file of its own and reads those of all others, so that runs may share a location.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from components.rlhf.config.storage import StorageConfig
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json_as

MAX_FILE_BYTES = 2**30
MAX_FILE_ANSWERS = 2000  # then a new file is begun, because a file is written as a whole
FLUSH_SECONDS = 1.0  # at most this much of the answers is lost when the process is killed


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an endpoint answered to one request."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    content: str
    finish_reason: str = ""
    refused: bool = False
    input_tokens: Annotated[int, Field(ge=0)] = 0
    output_tokens: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True)
class _Line:
    __pydantic_config__ = ConfigDict(extra="forbid")

    key: str
    answer: Answer


def request_digest(url: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of the address and the canonical JSON of a request."""
    text = json.dumps([url, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def default_answers_uri() -> str:
    """The folder for answers of this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(cache / "kfp-rlhf" / "answers")


class AnswerCache:
    """Answers by request digest. Thread-safe. A location that cannot be read or written is a warning: the answers stay in memory."""

    def __init__(self, store: Store, folder: str, log: Callable[[str], None]) -> None:
        self.store, self.folder, self.log = store, folder, log
        self._name = self._new_name()
        self._lock = Lock()
        self._own: dict[str, Answer] = {}
        self._flushed, self._flushed_at, self._failed = 0, time.monotonic(), False
        self._warned = False
        self._known = self._read_all()

    def get(self, key: str) -> Answer | None:
        with self._lock:
            return self._own.get(key) or self._known.get(key)

    def put(self, key: str, answer: Answer) -> None:
        with self._lock:
            self._own[key] = answer
            if not self._failed and time.monotonic() - self._flushed_at > FLUSH_SECONDS:
                self._flush()

    def flush(self) -> None:
        """Write what has not been written yet, also if an earlier attempt has failed."""
        with self._lock:
            self._failed = False
            self._flush()

    def _flush(self) -> None:
        if len(self._own) == self._flushed:
            return
        lines = [json.dumps(asdict(_Line(key=k, answer=a)), ensure_ascii=True) + "\n" for k, a in self._own.items()]
        try:
            self.store.write(self._name, "".join(lines).encode())
            self._flushed, self._flushed_at = len(self._own), time.monotonic()
            if self._flushed >= MAX_FILE_ANSWERS:
                self._known |= self._own
                self._own, self._flushed, self._name = {}, 0, self._new_name()
        except (InputError, OSError) as error:
            self._warn(error, "a rerun will ask the endpoint again")

    def _new_name(self) -> str:
        return f"{self.folder}/{uuid.uuid4().hex}.jsonl"

    def _read_all(self) -> dict[str, Answer]:
        known: dict[str, Answer] = {}
        try:
            for key in self.store.list(self.folder):
                for line in (self.store.read(key, limit=MAX_FILE_BYTES) or b"").splitlines():
                    try:
                        entry = parse_json_as(TypeAdapter(_Line), line)
                    except NotJsonError:
                        continue  # of another version; asked again
                    known[entry.key] = entry.answer
        except (InputError, OSError) as error:
            self._warn(error, "all answers are asked for")
        return known

    def _warn(self, error: Exception, consequence: str) -> None:
        self._failed = True
        if self._warned:
            return
        self._warned = True
        self.log(f"warning: the answers of endpoints cannot be kept in {self.store.uri} ({error}); {consequence}")


def open_answers(storage: StorageConfig, folder: str, log: Callable[[str], None]) -> AnswerCache:
    """The answers in one folder of storage.answers_uri."""
    return AnswerCache(open_store(storage.answers_uri or default_answers_uri(), storage), folder, log)
