"""Upload of local models, data and code to storage.uri, under the digest of their content."""

import glob
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from components.rlhf.artifacts.code import code_files
from components.rlhf.artifacts.manifest import sha256_of
from components.rlhf.config.params import Params
from components.rlhf.config.prepare_data import is_glob
from components.rlhf.config.storage import UPLOADS
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError
from pipelines.sources import DATA_SUFFIXES, is_on_mounted_volume, model_sources

Log = Callable[[str], None]
CODE = "code.path"


def local_sources(params: Params) -> dict[str, Path]:
    """Models, data and code that only this machine has, by params key: no S3 URI, hub id, package or path under cluster.claims."""
    sources = model_sources(params) | {
        f"{key}.path": source.path for key, source in params.data.keyed_sources().items()
    }
    if params.code.path:
        sources[CODE] = params.code.path
    return {
        key: Path(source).expanduser()
        for key, source in sources.items()
        if not is_on_mounted_volume(source, params)
        and (Path(source).expanduser().exists() or _is_path(source) or is_glob(source))
    }


def _is_path(source: str) -> bool:
    """Whether source can only be a path, even if it does not exist."""
    return "://" not in source and (source.startswith(("/", "./", "../", "~")) or source.endswith(DATA_SUFFIXES))


def plan_upload(params: Params) -> tuple[Params, list[tuple[Path, str]]]:
    """The params with uploaded locations for local sources, and the files to upload with their keys in storage.uri.

    Raises InputError for a missing source, and for a storage.uri that is null or that a cluster cannot read.
    """
    sources = local_sources(params)
    if not sources:
        return params, []
    uri = params.storage.uri
    key, path = next(iter(sources.items()))
    if uri is None:
        raise InputError(
            f"{key} is {path}, which a cluster cannot read; set storage.uri to s3://BUCKET/PREFIX to upload it."
        )
    if not uri.startswith("s3://") and not is_on_mounted_volume(uri.removeprefix("file://"), params):
        raise InputError(
            f"storage.uri is {uri}, a folder that a cluster cannot read, and {key} must be uploaded; "
            "set it to s3://BUCKET/PREFIX, or add the volume of the folder to cluster.claims."
        )
    uploads: dict[str, Path] = {}
    content = params.model_dump(mode="json")
    for key, path in sources.items():
        files = code_files(path) if key == CODE else _files(key, path)
        prefix = f"{UPLOADS}/sha256-{_digest(files)}"
        uploads |= {f"{prefix}/{name}": file for name, file in files.items()}
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section[int(part) if isinstance(section, list) else part]
        location = f"{uri.removeprefix('file://').rstrip('/')}/{prefix}"
        # A pattern of files becomes the folder of its matches.
        section[name] = f"{location}/{path.name}" if path.is_file() else location
    return Params.model_validate(content), [(file, key) for key, file in uploads.items()]


def upload(params: Params, uploads: list[tuple[Path, str]], log: Log) -> None:
    """Upload the files that are not in storage.uri yet. Their keys contain the digest of the content, so the size is enough to compare."""
    if not uploads:
        return
    assert params.storage.uri is not None
    store: Store = open_store(params.storage.uri, params.storage, log)
    sizes = store.list(UPLOADS)
    for file, key in uploads:
        if sizes.get(key) != file.stat().st_size:
            log(f"uploading {file} to {store.uri}/{key}")
            store.upload(file, key)


def _files(key: str, path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    if is_glob(str(path)) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise InputError(f"{key}: {path} matches no file; correct the path.")
        parent = Path(os.path.commonpath([file.parent for file in found]))
        return {file.relative_to(parent).as_posix(): file for file in found}
    if not path.is_dir():
        raise InputError(f"{key}: {path} does not exist; correct the path.")
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    if not files:
        raise InputError(f"{key}: {path} is an empty folder; correct the path.")
    return files


def _digest(files: dict[str, Path]) -> str:
    """SHA-256 of the names and contents of files."""
    lines = "".join(f"{sha256_of(file)}  {name}\n" for name, file in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()
