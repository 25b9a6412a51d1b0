"""The folder of the user's Python modules (code.path): a small one travels in the settings."""

import os
from pathlib import Path

from components.rlhf.artifacts.code import code_files, digest_of_code, pack_code
from components.rlhf.config.code import MAX_ARCHIVE_CHARS, CodeConfig
from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import find_secrets
from pipelines.sources import is_on_mounted_volume


def code_folder(params: Params, folder: Path) -> Path | None:
    """Where code.path is on this machine, relative to folder or to the working directory; None if it is elsewhere or not set.

    Raises InputError if it is nowhere.
    """
    path = params.code.path
    if path is None or path.startswith("s3://") or (not Path(path).exists() and is_on_mounted_volume(path, params)):
        return None
    try:
        found = next((p for p in (folder / Path(path).expanduser(), Path(path)) if p.is_dir()), None)
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a home directory of nobody
        found = None
    if found is None:
        raise InputError(
            f"code.path: {path[:200]} is not a folder next to the params file or in the working directory; correct the path."
        )
    return found


def read_code(params: Params, folder: Path | None) -> Params:
    """The params with the folder of code as an archive if it is small enough for settings, else with its absolute path."""
    if folder is None:
        return params
    _reject_secrets(folder)
    archive = pack_code(folder)
    small = len(archive) <= MAX_ARCHIVE_CHARS
    place = {"archive": archive} if small else {"path": str(folder.resolve())}
    code = CodeConfig.model_validate(place | {"digest": digest_of_code(folder)})
    return params.model_copy(update={"code": code})


def _reject_secrets(folder: Path) -> None:
    secrets = {name: value.encode() for name, value in find_secrets(os.environ).items()}
    for file, path in code_files(folder).items():
        content = path.read_bytes()
        for name, secret in secrets.items():
            if secret in content:
                raise InputError(
                    f"code.path: {file} contains the secret in the environment variable {name}, and would be copied into pipelines; "
                    "remove it, or rename the variable if it is not a secret."
                )
