"""Data sets and tables in the forms that MLflow shows."""

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.manifest import MANIFEST, read_manifest
from components.rlhf.config.policy import TITLES
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.runs import OpenRun

Cell = str | float | bool | None
DATA_KINDS = ("demonstrations", "preferences", "prompts")
# The use of each split in MLflow's words; others are shown by their own name.
CONTEXTS = {"train": "training", "ratings": "training", "validation": "validation", "heldout": "held-out"}
LOGGED_TABLES_TAG = "mlflow.loggedArtifacts"  # lists the tables that the UI opens under "Evaluation"
MAX_DIGEST_CHARS = 36  # of a data set in MLflow
SAMPLES = "samples.jsonl"  # of an evaluation
NUM_SHOWN_PROMPTS = 16


@dataclass(frozen=True)
class DataSet:
    """A split of a data set. digest is that of its file, or of the manifest of the data set for a split without a file of its own."""

    name: str
    split: str
    digest: str
    num_rows: int
    source: str


def data_sets_of(paths: Mapping[str, Path], uri_of: Mapping[str, str]) -> list[DataSet]:
    """The data sets among the folders that a stage reads, split by split. paths and uri_of are folders and addresses by option.

    A data set has the name under which it was written, the last part of its address: one option may stand for several. Folders without a
    valid manifest are left out; the stage itself refuses them.
    """
    found = []
    for name, folder in paths.items():
        if not (folder / MANIFEST).is_file():
            continue
        try:
            manifest = read_manifest(folder)
        except InputError:
            continue
        if manifest.kind not in DATA_KINDS:
            continue
        source = uri_of.get(name) or folder.resolve().as_uri()
        written_as = source.rstrip("/").rpartition("/")[2]
        for split, size in ((key.removeprefix("num_"), value) for key, value in manifest.facts.items()):
            entry = manifest.files.get(f"{split}.jsonl")
            if entry is not None:
                found.append(DataSet(written_as, split, entry.sha256, int(size), f"{source}/{split}.jsonl"))
    return found


def as_inputs(data_sets: Iterable[DataSet]) -> list[Any]:
    """Data sets as MLflow's inputs of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=f"{data_set.name}.{data_set.split}",
                digest=data_set.digest[:MAX_DIGEST_CHARS],
                source_type="uri",
                source=json.dumps({"uri": redact(data_set.source)}),
                profile=json.dumps({"num_rows": data_set.num_rows, "sha256": data_set.digest}),
            ),
            [InputTag("mlflow.data.context", CONTEXTS.get(data_set.split, data_set.split))],
        )
        for data_set in data_sets
    ]


def from_json(rows: Iterable[Mapping[str, Any]]) -> list[DataSet]:
    return [DataSet(**row) for row in rows]


def as_json(data_sets: Iterable[DataSet]) -> list[dict[str, Any]]:
    return [asdict(data_set) for data_set in data_sets]


def add_to_table(run: OpenRun, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Add rows to the table NAME.json of a run, without those that an earlier attempt has added."""
    file = f"{name}.json"
    table = _read_table(run, file)
    columns = table["columns"] or list(rows[0] if rows else ())
    known = {json.dumps(row) for row in table["data"]}
    for row in rows:
        cells = [redact(cell) if isinstance(cell := row.get(column), str) else cell for column in columns]
        if json.dumps(cells) not in known:
            table["data"].append(cells)
    text = json.dumps({"columns": columns, "data": table["data"]}, ensure_ascii=False)
    run.client.log_text(run.id, text, file)
    tags = run.client.get_run(run.id).data.tags
    tables = json.loads(tags.get(LOGGED_TABLES_TAG) or "[]")
    entry = {"path": file, "type": "table"}
    if entry not in tables:
        run.client.set_tag(run.id, LOGGED_TABLES_TAG, json.dumps([*tables, entry]))


def _read_table(run: OpenRun, file: str) -> dict[str, Any]:
    if not any(found.path == file for found in run.client.list_artifacts(run.id)):
        return {"columns": [], "data": []}
    with tempfile.TemporaryDirectory(prefix="rlhf-mlflow-") as folder:
        path = Path(run.client.download_artifacts(run.id, file, folder))
        return dict(json.loads(path.read_text(encoding="utf-8")))


def response_rows(samples: Iterable[Any]) -> list[dict[str, Cell]]:
    """The responses to the first validation prompts as rows of a table, which shows how they change from one evaluation to the next.

    samples are ValidationSamples of one evaluation of PPO, in the order of the prompts.
    """
    return [
        {
            "iteration": sample.iteration,
            "prompt": sample.prompt.prompt,
            "response": sample.response,
            "score": _rounded(sample.score),
            "KL": _rounded(sample.kl),
            "tokens": len(sample.response_ids),
        }
        for sample in itertools.islice(samples, NUM_SHOWN_PROMPTS)
    ]


def sample_rows(file: Path) -> Iterator[dict[str, Cell]]:
    """The rows of samples.jsonl of an evaluation as a table: prompt, responses, scores, and lengths in tokens."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            method = next(name for name in TITLES if name in row)
            sft, policy, title = row["sft"], row[method], TITLES[method]
            scores = [_rounded(side.get("judge_score")) for side in (sft, policy)]
            gain = None if scores[0] is None or scores[1] is None else _rounded(scores[1] - scores[0])
            yield {
                "prompt": row["prompt"],
                "SFT response": sft["response"],
                f"{title} response": policy["response"],
                "SFT judge score": scores[0],
                f"{title} judge score": scores[1],
                "gain in judge score": gain,
                "SFT reward": _rounded(sft.get("reward")),
                f"{title} reward": _rounded(policy.get("reward")),
                "KL": _rounded(policy.get("kl")),
                "SFT tokens": sft["num_tokens"],
                f"{title} tokens": policy["num_tokens"],
            }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
