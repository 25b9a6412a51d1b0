"""Texts in the languages of MLflow: filters of its search functions, keys of metrics and params, URIs of SQLite databases, links."""

import hashlib
import posixpath
import re
from pathlib import Path
from urllib.parse import quote, unquote

SQLITE = "sqlite:///"
TRAINING_VIEW = "workflowType=machine_learning"  # MLflow 3.17 otherwise opens what it has for GenAI applications
MAX_KEY_CHARS = 250
UNUSUAL = re.compile(r"[^/\w.\- :]")  # what MLflow refuses in a key (validate_param_and_metric_name of mlflow 3.17)


def equals(field: str, text: str) -> str:
    """A filter for the objects whose field is the text.

    MLflow's filters have two kinds of quotes and no way to escape one, so that the filter of a text with both also finds others; compare
    what it finds.
    """
    if "'" not in text:
        return f"{field} = '{text}'"
    if '"' not in text:
        return f'{field} = "{text}"'
    return f"{field} LIKE '{text.replace(chr(39), '%')}'"


def key_of(name: str) -> str:
    """The name as a key of a metric or param: itself, or one that MLflow accepts, different for different names."""
    key = posixpath.normpath(UNUSUAL.sub("_", name)).strip("/")
    if key == name and len(name) <= MAX_KEY_CHARS and not name.startswith(".."):
        return name
    return f"{key.replace('..', '__')[: MAX_KEY_CHARS - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def database_uri(file: Path) -> str:
    """The tracking URI of a SQLite file. SQLAlchemy decodes percent signs, and a question mark begins options."""
    return SQLITE + str(file.resolve()).replace("%", "%25").replace("?", "%3F")


def database_file(uri: str) -> Path | None:
    """The file of a SQLite database; None for any other tracking URI."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def link_to(address: str, experiment_id: str, run_id: str = "", tab: str = "") -> str:
    """Where people look at the runs of an experiment, or at a tab of one of them. address is that of an MLflow server."""
    path = "/".join(filter(None, ["runs", quote(run_id, safe=""), tab]))
    return f"{address.rstrip('/')}/#/experiments/{quote(experiment_id, safe='')}/{path}?{TRAINING_VIEW}"
