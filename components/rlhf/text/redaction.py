"""Secrets of the environment stay out of whatever is written for people and for other systems: logs, errors, MLflow, KFP, reports.

Settings hold none, which is checked where they are read (config/credentials.py, pipelines/settings.py). What remains are texts of
libraries that quote them: an address in an error, a header. Every text that leaves goes through redact().
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

from components.rlhf.text.credentials import ADDRESS, SIGNED, is_secret_name

HIDDEN = "***"
MIN_SECRET_CHARS = (
    8  # characters: a shorter value is a word that every text may hold, and no secret that anybody should use
)
HEADER = re.compile(r"(?i)(authorization\W{1,6}(?:bearer|basic)\s+)[^\s'\"]+")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def redact(text: str) -> str:
    """The text with *** in place of every secret of this process's environment, and of credentials in addresses and headers."""
    return redactor(os.environ)(text)


def redactor(environment: Mapping[str, str]) -> Callable[[str], str]:
    """As redact, for the environment of another process."""
    known = _pattern(tuple(sorted(set(find_secrets(environment).values()))))

    def redact_text(text: str) -> str:
        if known:
            text = known.sub(HIDDEN, text)
        if "://" in text:
            text = SIGNED.sub(rf"\g<1>{HIDDEN}", ADDRESS.sub(HIDDEN, text))
        return HUB_TOKEN.sub(HIDDEN, HEADER.sub(rf"\g<1>{HIDDEN}", text))

    return redact_text


def find_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Secrets, each by the variable that holds it; a key ends in [n] where a variable holds several."""
    found = {}
    for name, value in environment.items():
        for number, secret in enumerate(_secrets_of(name, value)):
            if len(secret) >= MIN_SECRET_CHARS:
                found[f"{name}[{number}]" if number else name] = secret
    return found


def redact_output() -> None:
    """From here on what this process prints goes through redact(): tracebacks and the logs of libraries, too."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RedactedStream):
            setattr(sys, name, cast(TextIO, RedactedStream(stream)))


class RedactedStream:
    """A text stream that redacts what is written. It keeps nothing back: threads and signal handlers write to it, too."""

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
        if "://" in value:  # a webhook's secret is its path, and libraries quote the path alone
            yield value.partition("://")[2].partition("/")[2]
        elif "\n" in value:  # a private key; logs are read line by line
            yield from (line.strip() for line in value.splitlines() if not line.startswith("-----"))
    for user in ADDRESS.findall(value):
        yield user
        yield user.partition(":")[2]


def _encodings(secret: str) -> set[str]:
    """How a secret is written in addresses, JSON, HTML, Python and headers."""
    plain = {secret, unquote(secret)}
    written: set[str] = set()
    for text in plain:
        written |= {quote(text, safe=""), quote(text), quote_plus(text), html.escape(text), repr(text)[1:-1]}
        written |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        written.add(base64.b64encode(text.encode(errors="surrogateescape")).decode())
    return plain | written


@functools.lru_cache(maxsize=8)
def _pattern(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    """The longest first: one secret may begin with another."""
    forms = sorted({form for secret in secrets for form in _encodings(secret)}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, forms))) if forms else None
