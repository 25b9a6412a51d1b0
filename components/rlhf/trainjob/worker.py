"""The side of the pods: inputs that are URIs become folders of the node, and the process of rank 0 delivers the outputs."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from components.rlhf.artifacts.manifest import MANIFEST
from components.rlhf.config.storage import StorageConfig
from components.rlhf.config.trainjob import DIGEST_VARIABLE, PLAN_VARIABLE
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError
from components.rlhf.trainjob.exchange import EXECUTOR_OUTPUT, deliver, download_input

OUTPUTS_VARIABLE = "RLHF_TRAINJOB_OUTPUTS"
NODE_FOLDER_VARIABLE = "RLHF_NODE_FOLDER"  # set by the first process of a node for those that it starts


@dataclass(frozen=True)
class Worker:
    """A process in a pod of a TrainJob. paths has the local path of each option; executor_input names a local output file."""

    store: Store
    key: str  # of the outputs
    digest: str
    folder: Path  # of this node
    paths: Mapping[str, Path | None]
    outputs: Mapping[str, Path]
    executor_input: str

    def deliver(self) -> None:
        """Copy the outputs to the shared storage: by rank 0, once they are complete."""
        deliver(self.store, self.key, self.digest, self.outputs, self.folder / EXECUTOR_OUTPUT)


def is_launcher() -> bool:
    """Whether this process is a task that launches its stage; it needs no torch."""
    return PLAN_VARIABLE in os.environ


def is_worker() -> bool:
    """Whether this process is in a pod of a TrainJob that such a task has created."""
    return OUTPUTS_VARIABLE in os.environ


def start_worker(options: Mapping[str, str | None], writes: Iterable[str], storage: str, executor_input: str) -> Worker:
    """Copy the inputs to this node, unless its first process has, or all nodes mount them. Raises InputError."""
    config = StorageConfig.from_json(storage)
    parent, _, name = os.environ[OUTPUTS_VARIABLE].rpartition("/")
    folder = Path(os.environ.get(NODE_FOLDER_VARIABLE) or tempfile.mkdtemp(prefix="rlhf-node-"))
    os.environ[NODE_FOLDER_VARIABLE] = str(folder)
    outputs = {name: folder / "outputs" / name for name in writes if options.get(name) is not None}
    inputs = {name: _local_input(uri, config, folder) for name, uri in options.items() if name not in outputs}
    return Worker(
        store=open_store(parent, config),
        key=name,
        digest=os.environ[DIGEST_VARIABLE],
        folder=folder,
        paths={**inputs, **outputs},
        outputs=outputs,
        executor_input=with_output_file(executor_input, folder / EXECUTOR_OUTPUT),
    )


def with_output_file(executor_input: str, file: Path) -> str:
    """The executor input with another path of the executor output, which is a path in the pod of the task."""
    if not executor_input:
        return ""
    content = json.loads(executor_input)
    content["outputs"]["outputFile"] = str(file)
    return json.dumps(content)


def _local_input(uri: str | None, config: StorageConfig, folder: Path) -> Path | None:
    if uri is None:
        return None
    if not uri.startswith("s3://"):  # on a volume that all nodes mount
        if not (Path(uri) / MANIFEST).is_file():
            raise InputError(
                f"Node {os.environ.get('PET_NODE_RANK', '0')} has no {uri}/{MANIFEST}, which the task has copied there; all nodes must "
                "mount one volume (cluster.checkpoint_claim, ReadWriteMany)."
            )
        return Path(uri)
    parent, _, name = uri.rpartition("/")
    target = folder / "inputs" / name
    download_input(open_store(parent, config), name, target)
    return target
