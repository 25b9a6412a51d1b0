"""Empty databases of MLflow, which takes many seconds to create the tables of one: all tests copy the same."""

import fcntl
import shutil
import tempfile
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
