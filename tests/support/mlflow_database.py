"""Empty databases of MLflow, which takes many seconds to create the tables of one: all tests copy the same."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from components.rlhf.tracking.texts import database_uri


def new_database(folder: Path) -> Path:
    """A database without runs, as folder/mlflow.db."""
    template = Path(tempfile.gettempdir()) / f"rlhf-tests-mlflow-{mlflow.__version__}.db"
    with template.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not template.is_file():
            draft = template.with_suffix(".writing")
            draft.unlink(missing_ok=True)
            MlflowClient(tracking_uri=database_uri(draft)).search_experiments()
            draft.rename(template)
    return Path(shutil.copyfile(template, folder / "mlflow.db"))


@contextlib.contextmanager
def default_database(uri: str) -> Iterator[None]:
    """Within the block, the functions of mlflow use this database.

    mlflow.set_tracking_uri also sets MLFLOW_TRACKING_URI, which stages of later tests would log to; None unsets it.
    """
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
