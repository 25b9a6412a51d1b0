"""Rows of measurements, one JSON object a line: what was run, on what code, on what machine."""

import hashlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from components.rlhf.config.params import Params

ROOT = Path(__file__).resolve().parents[1]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none when there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")


def command_digest(params: Params) -> str:
    """What tells settings apart: the first digits of the sha256 of those that are not at their defaults.

    So a setting that did not exist when a row was measured does not disown it. A default that changes goes unseen.
    """
    changed = json.dumps(params.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(changed.encode()).hexdigest()[:16]


def machine() -> str:
    """Processor, cores and memory, as the kernel tells them."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{found[1].strip() if found else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def rewrite(path: Path, name: str, text: str) -> None:
    """Put text between the marks `<!-- NAME -->` and `<!-- /NAME -->` of a document, which must have them once."""
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.DOTALL
    )
    if count != 1:
        sys.exit(f"{path} has {count} places for {name}; it needs one")
    path.write_text(new, encoding="utf-8")
