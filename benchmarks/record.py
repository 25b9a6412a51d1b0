"""Measured rows, one JSON object per line: what was run, on which code and on which machine."""

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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file; an empty list if the file does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")


def settings_digest(params: Params) -> str:
    """The first 16 hex digits of the sha256 of all parameters that differ from their defaults.

    A parameter that was added after a row was measured therefore does not invalidate the row. A changed default goes
    unnoticed. The section dpo of a run without DPO is left out.
    """
    unused = set() if params.runs("dpo") else {"dpo"}
    changed = json.dumps(params.model_dump(mode="json", exclude_defaults=True, exclude=unused), sort_keys=True)
    return hashlib.sha256(changed.encode()).hexdigest()[:16]


def describe_machine() -> str:
    """Processor, number of cores, memory and operating system, as the kernel reports them."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{found[1].strip() if found else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def replace_section(path: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->`. Exits with an error unless the document has one such section."""
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.DOTALL
    )
    if count != 1:
        sys.exit(f"{path} has {count} sections named {name}; expected exactly one")
    path.write_text(new, encoding="utf-8")
