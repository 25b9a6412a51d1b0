"""The context of a running stage: its settings, its tracking, and the outputs that it writes."""

import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar

from components.rlhf.artifacts.directory import atomic_directory
from components.rlhf.artifacts.manifest import MANIFEST, Manifest, write_manifest
from components.rlhf.checkpoints.stop_signal import StopSignal
from components.rlhf.config.base import BaseConfig
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.processes import Processes
from components.rlhf.config.storage import CheckpointConfig, StorageConfig, TrackingConfig
from components.rlhf.runtime.executor import MODEL_URI, PUBLISHED_ENDPOINT, PUBLISHED_URI, input_uri, output_uri
from components.rlhf.runtime.measured import PLANNED_STAGES, StageMemory, sentence
from components.rlhf.storage.copy import upload_folder
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.mlflow import Tracker
from components.rlhf.tracking.tables import SAMPLES, data_sets_of, sample_rows

if TYPE_CHECKING:  # register and notify run where torch is not installed
    from components.rlhf.checkpoints.manager import CheckpointManager
    from components.rlhf.checkpoints.spend import Ledger
    from components.rlhf.engine.protocol import Group
    from components.rlhf.runtime.training import TrainingContext

Config = TypeVar("Config", bound=BaseConfig)
RUN_ID = "RLHF_RUN_ID"
PLOT = r"<svg [^>]*xmlns=[^>]*>.*?</svg>"  # in a page; those without a namespace cannot be opened outside of it


def rank() -> int:
    """The rank of this process in the stage's process group."""
    return int(os.environ.get("RANK", "0"))


@dataclass
class StageRun(Generic[Config]):
    """The context of a running stage. Its outputs are reported to KFP when the stage succeeds."""

    name: str
    config: Config
    settings_text: str  # the JSON text of config without the budget; its digest is in manifests
    progress: Progress
    tracker: Tracker
    tracking: TrackingConfig
    run_id: str
    storage: StorageConfig = field(default_factory=StorageConfig)
    executor_input: str = ""
    stop: StopSignal = field(default_factory=StopSignal)
    processes: Processes = field(default_factory=Processes)
    started: float = field(default_factory=time.monotonic)
    on_end: list[Callable[[], None]] = field(default_factory=list)  # called at the end, also after a failure
    outputs: dict[str, Mapping[str, str | int | float]] = field(default_factory=dict)  # output -> metadata
    on_success: list[Callable[[], None]] = field(default_factory=list)  # called after the outputs have been reported
    memory: StageMemory = field(default_factory=StageMemory)
    checkpoints: "CheckpointManager | None" = None
    group: "Group | None" = None  # of a training stage
    program: str = ""  # the stage whose program this is; another name may be that of a second task of it
    paths: Mapping[str, Path] = field(default_factory=dict)  # of inputs and outputs
    measurements: Mapping[str, float] = field(default_factory=dict)  # of the last artifact that was written

    def log_inputs(self, names: Iterable[str]) -> None:
        """Log the data sets among the inputs of these names."""
        folders = {name: self.paths[name] for name in names if name in self.paths}
        uris = {name: input_uri(self.executor_input, name) for name in folders} if self.executor_input else {}
        data_sets = data_sets_of(folders, uris)
        if data_sets:
            self.tracker.log_inputs(data_sets)

    def plan_memory(self) -> None:
        """Plan what each process holds, for a comparison. A stage does not fail if its plan cannot be made."""
        if self.memory.plan is None and self.program in PLANNED_STAGES:
            saves = self.storage.checkpoint_uri is not None
            try:
                from components.rlhf.runtime.planned import plan_here  # with torch, which other stages do not need

                self.memory.plan = plan_here(self.program, self.config, self.paths, checkpoints=saves)
            except Exception as error:  # whatever the planner cannot read
                self.progress.log(f"memory is not planned ({error})")

    def training_context(self, config: CheckpointConfig, group: "Group", *inputs: Manifest) -> "TrainingContext":
        """What a trainer works with, once all ranks agree on settings, code and inputs. Every rank calls it, before it loads models.

        The checkpoints are those of this stage for these inputs in this run, under storage.checkpoint_uri (without one nothing is
        saved), and are deleted when the stage succeeds.
        """
        from components.rlhf.checkpoints.key import checkpoint_key
        from components.rlhf.checkpoints.manager import CheckpointManager  # imports torch
        from components.rlhf.checkpoints.run import delete_run_if_empty, mark_run, run_prefix
        from components.rlhf.runtime.agreement import require_shared_store
        from components.rlhf.runtime.training import TrainingContext

        self.require_agreement(group, *inputs)
        uri = self.storage.checkpoint_uri
        store = open_store(uri, self.storage, self.progress.log) if uri else None
        if store:
            require_shared_store(group, store)
        key = f"{run_prefix(self.run_id)}/{checkpoint_key(self.name, self.config, *inputs)}"
        if store and group.rank == 0:
            mark_run(store, self.run_id)
        ledger = self._open_ledger(store, group)
        checkpoints = CheckpointManager(store, key, config, group, self.progress.log, self.stop, ledger)
        self.on_end.append(checkpoints.release)
        checkpoints.require_budget()
        self.checkpoints, self.group = checkpoints, group
        self.plan_memory()
        self.on_success.append(checkpoints.delete_all)
        if store and group.rank == 0:
            self.on_success.append(lambda: delete_run_if_empty(store, self.run_id))
        return TrainingContext(checkpoints=checkpoints, progress=self.progress, tracker=self.tracker, group=group)

    def require_agreement(self, group: "Group", *inputs: Manifest) -> None:
        """Raise InputError on every rank unless all ranks have the same settings, code, inputs and versions. Every rank calls it."""
        from components.rlhf.runtime.agreement import require_agreement

        settings = {
            "settings": self.config.canonical_json(),
            "storage": self.storage.canonical_json(),
            RUN_ID: json.dumps(self.run_id),
        }
        require_agreement(group, settings, inputs, self.processes)

    def _open_ledger(self, store: Store | None, group: "Group") -> "Ledger | None":
        """On rank 0, the ledger of a run with a budget."""
        budget: BudgetConfig = getattr(self.config, "budget", BudgetConfig())
        if budget.limit is None:
            return None
        from components.rlhf.checkpoints.spend import Ledger
        from components.rlhf.engine.group import node_rank

        if store is None:
            raise InputError(
                "budget.limit is set, but storage.checkpoint_uri is not, where the run keeps what it has spent; set it."
            )
        num_nodes = len(set(group.gather([node_rank()])))
        if group.rank > 0:
            return None
        price = num_nodes * budget.price_per_hour
        ledger = Ledger(store, self.run_id, self.name, budget=budget.limit, price_per_hour=price, started=self.started)
        ledger.open()
        self.on_end.append(ledger.close)
        return ledger

    def report_output(self, output: str, manifest: Manifest) -> None:
        """Report an artifact to KFP, with its manifest as metadata."""
        self.outputs[output] = manifest.metadata()

    def write_artifact(
        self,
        output: str,
        path: Path,
        fill: Callable[[Path], object],
        *,
        kind: str,
        parents: Mapping[str, Manifest],
        facts: Mapping[str, str | int | float],
        tokenizer_of: Manifest | None = None,
        streamed: Iterable[object] = (),
        measurements: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Write an artifact atomically: fill(folder) writes its files, then the manifest is added. Only rank 0 writes.

        parents are the input artifacts by role; tokenizer_of is the input whose tokenizer the artifact uses. streamed is what fill
        reads that takes every rank (an engine's weights, gathered one by one): the other ranks read it too. measurements are kept beside
        those of this stage, its time in seconds and its memory.
        """
        if rank() > 0:
            deque(streamed, maxlen=0)  # keeps none of it
            self.memory.observe(self.group)
            return
        self.plan_memory()
        with atomic_directory(path) as folder:
            fill(folder)
            self.memory.observe(self.group)
            saved = self.checkpoints is not None and self.checkpoints.num_saves > 0
            seconds = round(time.monotonic() - self.started, 3)
            self.measurements = {**self.memory.numbers(saved=saved), "seconds": seconds, **measurements}
            manifest = write_manifest(
                folder,
                kind=kind,
                settings=self.settings_text,
                parents={role: parent.digest for role, parent in parents.items()},
                tokenizer_digest=tokenizer_of.tokenizer_digest if tokenizer_of else "",
                chat_template_digest=tokenizer_of.chat_template_digest if tokenizer_of else "",
                facts=facts,
                measurements=self.measurements,
            )
        if self.memory.plan is not None:
            memory = self.memory.numbers(saved=saved)
            self.progress.log(sentence(memory))
            self.tracker.log(memory, step=0)
        self.report_output(output, manifest)
        if kind.endswith("_model"):
            self._publish(output, path)
        samples = path / SAMPLES
        if kind == "evaluation" and samples.is_file():
            self.tracker.log_table("samples", list(sample_rows(samples)))

    def write_manifest(self, output: str, path: Path, *, of: str, folder: Path) -> None:
        """Write an output that is the manifest of another output in folder; its metadata says where that is. Only rank 0 writes."""
        if rank() > 0:
            return
        with atomic_directory(path) as draft:
            shutil.copyfile(folder / MANIFEST, draft / MANIFEST)
        uri = output_uri(self.executor_input, of) if self.executor_input else str(folder.resolve())
        self.outputs[output] = {**self.outputs[of], MODEL_URI: uri}

    def _publish(self, output: str, path: Path) -> None:
        """Copy a model to storage.publish_uri. KFP keeps its own copy, whose metadata names this one."""
        if self.storage.publish_uri is None:
            return
        key = f"{self.run_id}/{self.name}/{output}"
        uri = f"{self.storage.publish_uri.rstrip('/')}/{key}"
        upload_folder(open_store(self.storage.publish_uri, self.storage, self.progress.log), path, key, last=MANIFEST)
        self.progress.log(f"published as {uri}")
        endpoint = {PUBLISHED_ENDPOINT: self.storage.endpoint_url} if self.storage.endpoint_url else {}
        self.outputs[output] = {**self.outputs[output], PUBLISHED_URI: uri, **endpoint}

    def write_metrics(self, path: Path, metrics: Mapping[str, float]) -> None:
        """Write the output `metrics`: a JSON file, the metadata of KFP's Metrics artifact, and final/* in MLflow."""
        if rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        self.outputs["metrics"] = dict(metrics)
        self.tracker.log({f"final/{name}": value for name, value in metrics.items()}, step=0)

    def write_report(self, output: str, path: Path, text: str) -> None:
        """Write a Markdown or HTML output, and log it to MLflow, with its plots as pictures, which MLflow shows and compares."""
        if rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(redact(text), encoding="utf-8")
        self.outputs[output] = {}
        # KFP's paths have no suffix, by which MLflow decides how to show a file.
        self.tracker.log_file(path, f"{output}.html" if text.lstrip().startswith("<!") else f"{output}.md")
        for number, plot in enumerate(re.findall(PLOT, text, re.DOTALL), start=1):
            self.tracker.log_text(f"{output}.svg" if number == 1 else f"{output}_{number}.svg", plot)
