"""The manifest of an artifact directory: its kind, its lineage and the digest of every file.

`manifest.json` is written last, so that a directory without it is incomplete.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import ConfigDict, Field, TypeAdapter

from components.rlhf.artifacts.revision import code_revision
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json, parse_json_as

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
MAX_BYTES = 16 * 2**20  # limit for untrusted manifests; real ones have a few KiB
Kind = Literal[
    "base_model",
    "tokenizer",
    "prompts",
    "demonstrations",
    "preferences",
    "sft_model",
    "reward_model",
    "judge",
    "policy_model",
    "evaluation",
    "code",
    "checks",
]
KINDS: tuple[str, ...] = get_args(Kind)
Fact = str | int | float
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    __pydantic_config__ = STRICT

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]  # bytes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Kind, lineage and files of an artifact. Digests are lowercase hex sha256, or empty if there is none."""

    __pydantic_config__ = STRICT

    kind: Kind
    files: Mapping[str, FileEntry]  # posix path relative to the directory -> entry
    parents: Mapping[str, str] = field(default_factory=dict)  # role -> digest of that input's manifest
    tokenizer_digest: str = ""
    chat_template_digest: str = ""
    config_digest: str = ""
    code_revision: str = ""
    created_at: str = ""  # ISO 8601, UTC
    facts: Mapping[str, Fact] = field(default_factory=dict)  # metrics and properties, also shown as KFP metadata
    schema_version: int = SCHEMA_VERSION
    measurements: Mapping[str, float] = field(default_factory=dict)  # of the process that wrote it, such as its memory

    @property
    def digest(self) -> str:
        """sha256 of everything except created_at and measurements, so that the same content has the same digest."""
        content = asdict(self)
        del content["created_at"], content["measurements"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def metadata(self) -> dict[str, str | int | float]:
        """The manifest as KFP artifact metadata, which is flat and must not contain null."""
        metadata: dict[str, str | int | float] = {
            "kind": self.kind,
            "digest": self.digest,
            "tokenizer_digest": self.tokenizer_digest,
            "chat_template_digest": self.chat_template_digest,
            "config_digest": self.config_digest,
            "code_revision": self.code_revision,
            "num_bytes": sum(entry.size for entry in self.files.values()),
        }
        metadata |= {f"parent_{role}": digest for role, digest in self.parents.items()}
        return metadata | dict(self.facts) | dict(self.measurements)


MANIFEST_TYPE = TypeAdapter(Manifest)


def write_manifest(directory: Path, *, kind: str, settings: str = "", **fields: Any) -> Manifest:
    """Compute the digest of every file and write the manifest. settings is the canonical JSON of the stage's settings."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not an artifact kind; kinds: {', '.join(KINDS)}")
    files = {
        name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size)
        for name, path in list_files(directory).items()
    }
    manifest = Manifest(
        kind=cast(Kind, kind),
        files=files,
        config_digest=hashlib.sha256(settings.encode()).hexdigest() if settings else "",
        code_revision=code_revision(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **fields,
    )
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read and validate the manifest of an artifact. Raises InputError if it is missing or invalid."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder; an artifact is a folder with a {MANIFEST}.")
    if not path.is_file() or path.is_symlink():
        raise InputError(
            f"{directory} has no {MANIFEST}: it is incomplete or not an artifact; run the stage that creates it again."
        )
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise NotJsonError(f"longer than {MAX_BYTES // 2**20} MiB")
        return _parse(path, text)
    except (OSError, NotJsonError) as error:
        raise InputError(f"{path} is not a manifest ({error}); create the artifact again.") from error


def _parse(path: Path, text: bytes) -> Manifest:
    """Parse a manifest with full validation, because it is untrusted. Raises NotJsonError or InputError."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise NotJsonError(f"a {type(content).__name__}")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {repr(content.get('schema_version'))[:40]}, expected {SCHEMA_VERSION}; "
            "create the artifact again."
        )
    missing = {field.name for field in fields(Manifest)} - {"measurements"} - set(content)
    if missing:
        raise NotJsonError(f"{min(missing)} is missing")
    manifest = parse_json_as(MANIFEST_TYPE, text)
    for name in manifest.files:
        _require_relative_path(path, name)
    return manifest


def _require_relative_path(path: Path, name: str) -> None:
    parts = name.split("/")
    plain = name.isprintable() and len(name) < 1000 and "\\" not in name and not re.match("[A-Za-z]:", name)
    if not plain or not all(parts) or {".", ".."} & set(parts):
        raise InputError(
            f"{path.parent}: its manifest lists {ascii(name)[1:-1][:200]}, which is not a path inside the artifact; "
            "do not trust this artifact."
        )


def list_files(directory: Path) -> dict[str, Path]:
    """All files of an artifact except its manifest, by posix path relative to the directory.

    Raises InputError for anything but regular files and folders: links could lead out of it, and reading a pipe could block.
    """
    paths: dict[str, Path] = {}
    for folder, folders, names in os.walk(directory):
        for name in (*folders, *names):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "a pipe or a device"
                raise InputError(f"{path} is {kind}, expected a file or a folder; do not trust this artifact.")
            if stat.S_ISREG(mode):
                paths[path.relative_to(directory).as_posix()] = path
    paths.pop(MANIFEST, None)
    return dict(sorted(paths.items()))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
