"""Atomic writes of artifact directories, and verification before reading."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from components.rlhf.artifacts.manifest import Manifest, list_files, read_manifest, sha256_of
from components.rlhf.text.errors import InputError


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory, which is renamed to target on success and deleted on failure.

    It is next to the target, so that the rename is within one file system and atomic.
    """
    temporary = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if target.is_dir():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{target.parent} has no space left for {target.name}; free some space and run again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise InputError(f"{target.parent} is not writable; choose another output folder.") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_artifact(directory: Path, *kinds: str) -> Manifest:
    """Verify an artifact of one of these kinds and return its manifest.

    Raises InputError if the manifest is missing, the kind differs, a file is missing, added or modified, or the directory
    contains symbolic links, devices or names that lead out of it.
    """
    manifest = read_manifest(directory)
    if manifest.kind not in kinds:
        raise InputError(f"{directory} is a {manifest.kind}, expected a {' or '.join(kinds)}; pass the right artifact.")
    files = list_files(directory)  # also ensures that no path contains a symbolic link
    for name, entry in manifest.files.items():
        path = files.get(name)
        if path is None:
            raise InputError(f"{directory} lacks {name}, which its manifest lists; create the artifact again.")
        if path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            raise InputError(f"{path} does not match its manifest (sha256 differs); create the artifact again.")
    if added := sorted(files.keys() - manifest.files.keys()):  # such as a chat template, which transformers would load
        raise InputError(f"{directory} contains {added[0]}, which its manifest does not list; delete that file.")
    return manifest


def require_same_tokenizer(**artifacts: tuple[Path, Manifest]) -> None:
    """Raise InputError unless all artifacts with a tokenizer have the same tokenizer and chat template."""
    with_tokenizer = [(role, *pair) for role, pair in artifacts.items() if pair[1].tokenizer_digest]
    for role, path, other in with_tokenizer[1:]:
        first_role, first_path, first = with_tokenizer[0]
        for name in ("tokenizer", "chat_template"):
            if getattr(first, f"{name}_digest") != getattr(other, f"{name}_digest"):
                raise InputError(
                    f"The {first_role} ({first_path}) and the {role} ({path}) have different {name.replace('_', ' ')}s; "
                    "token ids would mean different text. Train both from the same base model."
                )


def open_inputs(**folders: Path | None) -> dict[str, Manifest]:
    """The manifests of input artifacts, each named by the kind that it must have; None is left out. All must have the same tokenizer."""
    given = {kind: folder for kind, folder in folders.items() if folder is not None}
    inputs = {kind: open_artifact(folder, kind) for kind, folder in given.items()}
    require_same_tokenizer(**{kind: (given[kind], manifest) for kind, manifest in inputs.items()})
    return inputs
