"""The manifest of an artifact directory: what it is, what it was made from, and the digest of every file.

Law of this room: what lies on disk between stages; standard library and safetensors. `manifest.json` is written last, so a
directory without one is incomplete whatever else it holds.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.revision import code_revision
from components.rlhf.errors import InputError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
KINDS = (
    "base_model",
    "prompts",
    "demonstrations",
    "preferences",
    "sft_model",
    "reward_model",
    "judge",
    "policy_model",
    "evaluation",
    "code",
)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    sha256: str
    size: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one artifact says of itself. Digests are lowercase hex sha256; an absent one is the empty string."""

    kind: str
    files: Mapping[str, FileEntry]  # posix path relative to the directory -> entry
    parents: Mapping[str, str] = field(default_factory=dict)  # role -> digest of that input's manifest
    tokenizer_digest: str = ""
    chat_template_digest: str = ""
    config_digest: str = ""
    code_revision: str = ""
    created_at: str = ""  # ISO 8601, UTC
    facts: Mapping[str, str | int | float] = field(default_factory=dict)  # flat, for people and for KFP metadata
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """sha256 of everything but the time of creation: the same content made twice has the same digest."""
        content = asdict(self)
        del content["created_at"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def metadata(self) -> dict[str, str | int | float]:
        """The manifest as the flat strings and numbers that KFP accepts as artifact metadata (no null, no nesting)."""
        flat: dict[str, str | int | float] = {
            "kind": self.kind,
            "digest": self.digest,
            "tokenizer_digest": self.tokenizer_digest,
            "chat_template_digest": self.chat_template_digest,
            "config_digest": self.config_digest,
            "code_revision": self.code_revision,
            "num_bytes": sum(entry.size for entry in self.files.values()),
        }
        flat |= {f"parent_{role}": digest for role, digest in self.parents.items()}
        return flat | dict(self.facts)


def write_manifest(directory: Path, *, kind: str, settings: str = "", **fields: Any) -> Manifest:
    """Digest every file of the directory and write its manifest. settings is the stage's canonical JSON."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind of artifact; kinds are {', '.join(KINDS)}")
    files = {
        name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size) for name, path in files_of(directory).items()
    }
    manifest = Manifest(
        kind=kind,
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
    """The manifest of an artifact. Raises InputError when there is none or it cannot be understood."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder; an artifact is a folder with a {MANIFEST}.")
    if not path.is_file():
        raise InputError(
            f"{directory} has no {MANIFEST}: it is incomplete or no artifact; run the stage that makes it again."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{path} has schema version {content.get('schema_version')!r}; this version reads {SCHEMA_VERSION}. "
                "Make the artifact again."
            )
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        return Manifest(files=files, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a manifest ({error}); make the artifact again.") from error


def files_of(directory: Path) -> dict[str, Path]:
    """Every file of an artifact but its manifest, by its posix path relative to the directory."""
    paths = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    paths.pop(MANIFEST, None)
    return paths


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
