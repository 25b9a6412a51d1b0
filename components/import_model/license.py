"""The license of a model, as its source states it."""

import email
import re
import zipfile
from pathlib import Path

from components.rlhf.artifacts.manifest import MANIFEST, read_manifest
from components.rlhf.text.errors import InputError

CARD = "README.md"
MAX_BYTES = 2**20
NAME = r"[\"']?(\w[\w.+ -]{0,79}?)[\"']?\s*$"


def license_of(source: Path) -> str:
    """The license in the metadata of a model folder's card, of an artifact, or of a wheel; "" if it states none."""
    try:
        if source.is_file():
            return _of_wheel(source)
        if (source / MANIFEST).is_file():
            return str(read_manifest(source).facts.get("license", ""))
        with (source / CARD).open("rb") as file:
            return _of_card(file.read(MAX_BYTES).decode("utf-8", errors="replace"))
    except (OSError, ValueError, InputError, zipfile.BadZipFile):
        return ""


def _of_card(text: str) -> str:
    """From the block between --- that opens a card of the Hugging Face Hub; license_name is that of a license outside of its list."""
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not found:
        return ""
    names = [
        re.search(rf"^{key}:[ \t]*(?:\n[ \t]*-[ \t]*)?{NAME}", found[1], re.MULTILINE)
        for key in ("license_name", "license")
    ]
    return next((name[1].strip() for name in names if name), "")


def _of_wheel(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [e for e in archive.infolist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", e.filename)]
        with archive.open(entry) as file:
            fields = email.message_from_bytes(file.read(MAX_BYTES))
    stated = str(fields.get("License-Expression") or fields.get("License") or "").strip()
    return stated if re.fullmatch(r"[\w.+() -]{1,80}", stated) else ""
