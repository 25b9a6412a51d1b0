"""Where a run reads models and data from."""

from pathlib import PurePosixPath

from components.rlhf.config.judge import as_list
from components.rlhf.config.params import Params
from components.rlhf.config.prepare_data import is_glob
from components.rlhf.storage.pypi import PREFIX

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv", ".gz")


def data_sources(params: Params) -> list[str]:
    """The locations that prepare_data reads, without duplicates."""
    return sorted({source.path for source in params.data.keyed_sources().values()})


def sources_of(params: Params) -> list[str]:
    """Every location that a run reads a model or data from, without duplicates."""
    return sorted({*model_sources(params).values(), *data_sources(params)})


def model_sources(params: Params) -> dict[str, str]:
    """The locations that models are imported from, by their key in a params file."""
    sources = {
        "model.source": params.model.source,
        "sft.use": params.sft.use,
        "reward_model.use": params.reward_model.use,
    }
    for number, judge in enumerate(as_list(params.judge)):
        key = f"judge.{number}.use" if isinstance(params.judge, tuple) else "judge.use"
        sources[key] = getattr(judge, "use", None)
    return {key: source for key, source in sources.items() if source}


def is_remote(source: str) -> bool:
    """Whether a source is a Hugging Face id or a package, not a path, a pattern of paths or an S3 URI."""
    is_path = source.startswith(("s3://", "/", "./", "../", "~")) or PurePosixPath(source).suffix in DATA_SUFFIXES
    return not is_path and not is_glob(source)


def is_on_hub(source: str) -> bool:
    """Whether a source is a Hugging Face id."""
    return is_remote(source) and not source.startswith(PREFIX)


def is_on_mounted_volume(source: str, params: Params) -> bool:
    """Whether a source is under cluster.claims."""
    return any(is_within(source, path) for path in params.cluster.claims)


def is_within(path: str, folder: str) -> bool:
    """Whether path is the folder or inside it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
