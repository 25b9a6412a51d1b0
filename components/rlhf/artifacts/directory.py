"""Writing an artifact whole or not at all, and opening one only after it has been verified."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from components.rlhf.artifacts.manifest import Manifest, files_of, read_manifest, sha256_of
from components.rlhf.text.errors import InputError


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A fresh folder to fill; it becomes target when the block ends well, and is deleted when it does not.

    The folder lies beside the target, so that the final rename is atomic on one file system.
    """
    draft = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        if target.is_dir():
            shutil.rmtree(target)
        draft.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{target.parent} has no room left while writing {target.name}; free some space and run again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise InputError(f"{target.parent} is not writable; choose another output folder.") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def open_artifact(directory: Path, *kinds: str) -> Manifest:
    """The manifest of a directory whose kind is one of kinds and whose every file has its digest.

    Raises InputError naming the directory and what is wrong: missing manifest, other kind, missing, added or altered file,
    a link or a device in it, a name that leads out of it.
    """
    manifest = read_manifest(directory)
    if manifest.kind not in kinds:
        raise InputError(
            f"{directory} is a {manifest.kind}, but a {' or '.join(kinds)} is needed here; pass the right artifact."
        )
    found = files_of(directory)  # first: no path below leads over a link
    for name, entry in manifest.files.items():
        path = found.get(name)
        if path is None:
            raise InputError(f"{directory} lacks {name}, which its manifest lists; make the artifact again.")
        if path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            raise InputError(f"{path} is not what its manifest says (sha256 differs); make the artifact again.")
    added = [name for name in found if name not in manifest.files]
    if added:  # an index of weights or a chat template would change what is loaded
        raise InputError(f"{directory} holds {added[0]}, which its manifest does not list; delete that file.")
    return manifest


def require_same_tokenizer(**artifacts: tuple[Path, Manifest]) -> None:
    """Raise InputError unless all artifacts that have a tokenizer have the same one and the same chat template."""
    with_tokenizer = {role: pair for role, pair in artifacts.items() if pair[1].tokenizer_digest}
    roles = list(with_tokenizer)
    for role in roles[1:]:
        (first_path, first), (path, other) = with_tokenizer[roles[0]], with_tokenizer[role]
        for what in ("tokenizer", "chat_template"):
            if getattr(first, f"{what}_digest") != getattr(other, f"{what}_digest"):
                raise InputError(
                    f"The {roles[0]} ({first_path}) and the {role} ({path}) have different {what.replace('_', ' ')}s; "
                    "token ids would mean different text. Train both from the same base model."
                )
