"""What a failed request to MLflow means: whether it may succeed later, and what a user can do if it cannot."""

import os
import sys
from typing import Any

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.tracking.texts import database_file

# Error codes of MLflow's REST API (mlflow/protos/databricks.proto). All others, such as TEMPORARILY_UNAVAILABLE, may pass.
FORBIDDEN = {"PERMISSION_DENIED"}
UNKNOWN_USER = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
NOT_MLFLOW = {"ENDPOINT_NOT_FOUND", "NOT_FOUND", "NOT_IMPLEMENTED"}
GONE = {"RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
INVALID = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}
CODE_OF_STATUS = {400: "BAD_REQUEST", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "ENDPOINT_NOT_FOUND"}
NOT_ACTIVE = "'active' state"  # in the message about a deleted run or experiment, whose code is INVALID_PARAMETER_VALUE
NOT_JSON = "was not in a valid JSON format"  # such as the page of a login
OLD_SCHEMA = "out-of-date database schema"


def code_of(error: Exception) -> str:
    """MLflow's error code of a failed request; "" if there was no answer. Uploads of files raise errors of requests."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return str(getattr(error, "error_code", "") or CODE_OF_STATUS.get(status or 0, ""))


def is_permanent(error: Exception, *, has_worked: bool = False) -> bool:
    """Whether the same request would fail again, however long one waits.

    An address that has_worked may be answered by something else for a while, such as an ingress whose server restarts.
    """
    code, message = code_of(error), str(error)
    if code in NOT_MLFLOW or NOT_JSON in message:
        return not has_worked
    known = code in FORBIDDEN | UNKNOWN_USER | GONE | INVALID or OLD_SCHEMA in message
    return known or isinstance(error, UnusableFileError) or is_unsendable(error)


def concerns_content(error: Exception) -> bool:
    """Whether a permanent answer is about what was sent, so that something else may be accepted."""
    return (code_of(error) in INVALID and NOT_ACTIVE not in str(error)) or is_unsendable(error)


def is_unsendable(error: Exception) -> bool:
    """Whether the client itself has refused what was to be sent, such as a text that is not UTF-8. Errors of networks are OSErrors."""
    return type(error) is Exception or (
        isinstance(error, ValueError | TypeError | LookupError) and not isinstance(error, OSError)
    )


def warn(error: Exception, config: TrackingConfig | None = None, *, has_worked: bool = False) -> None:
    """Say on stderr that MLflow could not be used and why, and for a permanent answer what to do."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    text = f"MLflow could not be used, continuing without it ({reason})"
    if is_permanent(error, has_worked=has_worked):
        text = "; ".join(filter(None, [text, remedy(error, config or TrackingConfig())]))
    print(f"warning: {text}", file=sys.stderr, flush=True)


def remedy(error: Exception, config: TrackingConfig) -> str:
    """What to do about a permanent answer."""
    code, message = code_of(error), str(error)
    if isinstance(error, UnusableFileError):
        return "correct tracking.uri, or the permissions of that folder"
    if OLD_SCHEMA in message:
        return "upgrade the database with: mlflow db upgrade URI, or set tracking.uri to another one"
    if code in FORBIDDEN:
        return f"ask for permission to edit the experiment {config.experiment} and the model {config.registered_model}"
    if code in UNKNOWN_USER:
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN (on a cluster, in the Secret "
            "cluster.secrets.mlflow)"
        )
    if code in NOT_MLFLOW or NOT_JSON in message:
        return "correct tracking.uri: what answers there is no MLflow server, or asks for a login"
    if NOT_ACTIVE in message or code in GONE:
        return f"restore what was deleted, or set tracking.experiment to another name than {config.experiment}"
    return "correct tracking.uri, tracking.experiment or tracking.registered_model" if code in INVALID else ""


class UnusableFileError(Exception):
    """A SQLite database that cannot be opened, for which MLflow would wait for minutes."""


def require_usable_file(uri: str) -> None:
    """Raise UnusableFileError for a SQLite database that cannot be created or written."""
    file = database_file(uri)
    if file is None or not str(file):
        return
    if file.is_dir() or not file.parent.is_dir():
        raise UnusableFileError(
            f"{file} cannot be a database: {'it' if file.is_dir() else file.parent} is {_what(file)}"
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UnusableFileError(f"{file} cannot be written")


def _what(file: Any) -> str:
    return "a folder" if file.is_dir() else "no folder"
