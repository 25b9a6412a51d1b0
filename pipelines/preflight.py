"""Checks of local inputs before the first stage starts, so that a bad line is found before a model is loaded."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from components.rlhf.config.checks import LmEvalCheck
from components.rlhf.config.params import Params
from components.rlhf.config.prepare_data import DataSource, is_glob
from components.rlhf.data.reading import read_examples, section_of, source_name, uses_chat_template
from components.rlhf.data.sources import suffix_of
from components.rlhf.data.tally import Tally
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError
from pipelines.sources import model_sources


def check_inputs(params: Params, *, is_on_cluster: Callable[[str], bool] = lambda source: False) -> None:
    """Raise InputError for a local model folder without tokenizer or config, or a local data file that prepare_data would reject.

    The stages that read them check hub ids, packages, S3 URIs, and the paths for which is_on_cluster is true.
    """
    for key, source in model_sources(params).items():
        if _is_local(source) and not is_on_cluster(source):
            _check_model(key, Path(source))
    local = {
        key: source
        for key, source in params.data.keyed_sources().items()
        if _is_file(source) and not is_on_cluster(source.path)
    }
    for key, source in local.items():
        tally = Tally(name=source_name(key, source))
        tally.kept = sum(1 for _ in read_examples(section_of(key), source, tally))
        tally.require_usable()
    uses_chat_template(params.data, local, has_template=None)


def check_packages(params: Params) -> None:
    """Raise InputError for a run on this machine with checks of lm-evaluation-harness, which is not installed or has no such task.

    Tasks of the user's own are read by the stage.
    """
    checks = {n: check for n, check in enumerate(params.gate.checks) if isinstance(check, LmEvalCheck)}
    if checks and find_spec("lm_eval") is None:
        raise InputError(
            "gate.checks has a check of kind lm_eval, and lm-evaluation-harness is not installed here; install the extra evals "
            "(pip install -c constraints.txt -e '.[evals]'), or remove the check."
        )
    named = {task: n for n, check in checks.items() if check.include_path is None for task in check.tasks}
    if not named:
        return
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    for task, number in named.items():
        if task not in known:
            close = get_close_matches(task, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "set include_path for a task of your own."
            raise InputError(f"gate.checks.{number}.tasks: lm-evaluation-harness has no task {task}; {hint}")


def check_stores(params: Params) -> None:
    """Raise InputError if the S3 store of checkpoints, published models or answers is unreachable or denies access."""
    for key in ("checkpoint_uri", "publish_uri", "answers_uri"):
        uri: str | None = getattr(params.storage, key)
        if uri and uri.startswith("s3://"):
            try:
                open_store(uri, params.storage).read("anything", limit=10**9)
            except InputError as error:
                raise InputError(f"storage.{key}: {error}") from None


def _is_local(source: str) -> bool:
    return Path(source).exists() or source.startswith(("/", "./", "../", "~"))


def _is_file(source: DataSource) -> bool:
    if source.path.startswith("s3://") or source.format in ("hub", "movie_ratings"):
        return False
    is_named_as_file = source.format != "auto" or suffix_of(source.path) != "" or is_glob(source.path)
    return is_named_as_file or Path(source.path).is_dir()


def _check_model(key: str, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{key}: {folder} is not a folder; correct the path.")
    if not (folder / "config.json").is_file():
        raise InputError(f"{key}: {folder} has no config.json; it is not a model folder in the Hugging Face layout.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{key}: {folder} has no tokenizer (no tokenizer.json); save the model's tokenizer into it.")
