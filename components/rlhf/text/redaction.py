"""Redaction of the environment's secrets from all output: logs, errors, MLflow, KFP and reports.

Settings contain no secrets (checked by config/base.py and pipelines/settings.py), but libraries quote them, for example a URL
in an error message or a header. All text that leaves a process goes through redact().
"""

import base64
import functools
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus, unquote

from components.rlhf.text.credentials import QUERY_SECRET, USERINFO, is_secret_name

HIDDEN = "***"
MIN_SECRET_CHARS = 8  # a shorter value is too likely to occur in ordinary text
HEADER = re.compile(r"(?i)(authorization\W{1,6}(?:bearer|basic)\s+)[^\s'\"]+")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def redact(text: str) -> str:
    """Replace secrets of this process's environment, and credentials in URLs and headers, by ***."""
    return redactor(os.environ)(text)


def redactor(environment: Mapping[str, str]) -> Callable[[str], str]:
    """Return redact() for the environment of another process."""
    secrets = _secrets_pattern(tuple(sorted(set(find_secrets(environment).values()))))

    def redact_text(text: str) -> str:
        if secrets:
            text = secrets.sub(HIDDEN, text)
        if "://" in text:
            text = QUERY_SECRET.sub(rf"\g<1>{HIDDEN}", USERINFO.sub(HIDDEN, text))
        return HUB_TOKEN.sub(HIDDEN, HEADER.sub(rf"\g<1>{HIDDEN}", text))

    return redact_text


def find_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Secrets of at least 8 characters, by variable name; further secrets of one variable have keys NAME[n].

    Another thread may remove a variable meanwhile, as MLflow's does.
    """
    return {
        f"{name}[{index}]" if index else name: secret
        for name in list(environment)
        for index, secret in enumerate(_secrets_of(name, environment.get(name, "")))
        if len(secret) >= MIN_SECRET_CHARS
    }


def redact_output() -> None:
    """Redact everything that this process prints from now on, including tracebacks and the logs of libraries."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RedactedStream):
            setattr(sys, name, cast(TextIO, RedactedStream(stream)))


class RedactedStream:
    """A text stream that redacts each write. It does not buffer, because threads and signal handlers write to it too."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _secrets_of(name: str, value: str) -> Iterator[str]:
    value = value.strip()
    if is_secret_name(name) and not (value.startswith(("/", "~", "./")) and os.path.exists(os.path.expanduser(value))):
        yield value
        if "://" in value:  # a webhook's secret is its path, which libraries quote without the host
            yield value.partition("://")[2].partition("/")[2]
        elif "\n" in value:  # a private key, which may be logged line by line
            yield from (line.strip() for line in value.splitlines() if not line.startswith("-----"))
    for userinfo in USERINFO.findall(value):
        yield userinfo
        yield userinfo.partition(":")[2]


def _encodings(secret: str) -> set[str]:
    """The secret as it is encoded in URLs, JSON, HTML, Python and headers."""
    plain = {secret, unquote(secret)}
    encoded: set[str] = set()
    for text in plain:
        encoded |= {quote(text, safe=""), quote(text), quote_plus(text), html.escape(text), repr(text)[1:-1]}
        encoded |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        encoded.add(base64.b64encode(text.encode(errors="surrogateescape")).decode())
    return plain | encoded


@functools.lru_cache(maxsize=8)
def _secrets_pattern(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    """Matches any encoding of any secret; the longest first, because one secret may start with another."""
    encodings = sorted({text for secret in secrets for text in _encodings(secret)}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, encodings))) if encodings else None
