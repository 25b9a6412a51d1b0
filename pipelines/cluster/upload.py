"""Local models and data on their way to a cluster: copied to storage.uri under their digest, and named by that place from then on."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from components.rlhf.artifacts.manifest import sha256_of
from components.rlhf.config.params import Params
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError
from pipelines.placement import FILES, is_within

Log = Callable[[str], None]


def local_sources(params: Params) -> dict[str, Path]:
    """What lies on this machine alone, by its key in the params file. S3, hubs, packages and paths of cluster.claims do not."""
    sources = {
        "model.source": params.model.source,
        "sft.use": params.sft.use,
        "reward_model.use": params.reward_model.use,
    }
    for name in ("demonstrations", "preferences", "prompts"):
        source = getattr(params.data, name)
        sources[f"data.{name}.path"] = source.path if source else None
    return {
        key: Path(source).expanduser()
        for key, source in sources.items()
        if source
        and not is_on_mounted_volume(source, params)
        and (Path(source).expanduser().exists() or _is_path(source))
    }


def _is_path(source: str) -> bool:
    """Whether it can be nothing but a path, there or not."""
    return "://" not in source and (source.startswith(("/", "./", "../", "~")) or source.endswith(FILES))


def is_on_mounted_volume(source: str, params: Params) -> bool:
    return any(is_within(source, path) for path in params.cluster.claims)


def plan_upload(params: Params) -> tuple[Params, list[tuple[Path, str]]]:
    """The params as a cluster gets them, and what has to be copied first: files with their keys in storage.uri.

    Raises InputError for a source that is not there, and when there is no place that a cluster could read it from.
    """
    found = local_sources(params)
    if not found:
        return params, []
    uri = params.storage.uri
    key, path = next(iter(found.items()))
    if uri is None:
        raise InputError(
            f"{key} is {path}, which a cluster cannot read; set storage.uri to s3://BUCKET/PREFIX, and it is copied there."
        )
    if not uri.startswith("s3://") and not is_on_mounted_volume(uri.removeprefix("file://"), params):
        raise InputError(
            f"storage.uri is {uri}, a folder that a cluster cannot read, and {key} lies on this machine; "
            "write s3://BUCKET/PREFIX, or name the volume that the folder is on in cluster.claims."
        )
    copies: dict[str, Path] = {}
    content = params.model_dump(mode="json")
    for key, path in found.items():
        files = _files(key, path)
        place = f"uploads/sha256-{_digest(files)}"
        copies |= {f"{place}/{name}": file for name, file in files.items()}
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section[part]
        section[name] = f"{uri.removeprefix('file://').rstrip('/')}/{place}" + (
            f"/{path.name}" if path.is_file() else ""
        )
    return Params.model_validate(content), [(file, key) for key, file in copies.items()]


def upload(params: Params, copies: list[tuple[Path, str]], log: Log) -> None:
    """Copy what is not there yet. A key holds the digest of its content, so that what is there is what is wanted."""
    if not copies:
        return
    assert params.storage.uri is not None
    store: Store = open_store(params.storage.uri, params.storage, log)
    there = store.list("uploads")
    missing = [(file, key) for file, key in copies if there.get(key) != file.stat().st_size]
    for file, key in missing:
        log(f"copying {file} to {store.uri}/{key}")
        store.upload(file, key)


def _files(key: str, path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise InputError(f"{key}: {path} does not exist; correct the path.")
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    if not files:
        raise InputError(f"{key}: {path} is an empty folder; correct the path.")
    return files


def _digest(files: dict[str, Path]) -> str:
    """Of names and contents."""
    lines = "".join(f"{sha256_of(file)}  {name}\n" for name, file in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()
