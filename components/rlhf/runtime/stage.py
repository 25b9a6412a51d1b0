"""The frame of every stage program: options, settings, tracking, errors, and KFP's executor output."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, TypeVar

import click
from pydantic import ValidationError

from components.rlhf.artifacts.directory import atomic_directory
from components.rlhf.artifacts.manifest import MANIFEST, Manifest, write_manifest
from components.rlhf.checkpoints.stop_signal import StopSignal
from components.rlhf.config.base import BaseConfig
from components.rlhf.config.budget import BudgetConfig, without_budget
from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.processes import Processes
from components.rlhf.config.storage import CheckpointConfig, StorageConfig, TrackingConfig
from components.rlhf.runtime.accelerators import require_accelerators
from components.rlhf.runtime.elsewhere import errors_as_lines, launch_stage, start_stage_worker
from components.rlhf.runtime.executor import MODEL_URI, PUBLISHED_URI, output_uri, write_executor_output
from components.rlhf.runtime.measured import PLANNED_STAGES, StageMemory, sentence
from components.rlhf.runtime.memory import collect_old_objects_rarely, keep_few_kernels, keep_freed_memory
from components.rlhf.runtime.nodes import STARTED, launch_processes
from components.rlhf.runtime.process import die_with_parent, end_before_finalization
from components.rlhf.runtime.termination import message_of, tell_launcher, write_termination_message
from components.rlhf.storage.copy import upload_folder
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from components.rlhf.text.redaction import redact, redact_output
from components.rlhf.tracking.mlflow import MANUAL_RUN_ID, Tracker, start_tracking, with_environment_uri
from components.rlhf.tracking.process import start_tracking_process
from components.rlhf.trainjob.worker import is_launcher, is_worker

if TYPE_CHECKING:  # register and notify run where torch is not installed
    from components.rlhf.checkpoints.manager import CheckpointManager
    from components.rlhf.checkpoints.spend import Ledger
    from components.rlhf.engine.protocol import Group
    from components.rlhf.runtime.training import TrainingContext

Config = TypeVar("Config", bound=BaseConfig)
RUN_ID = "RLHF_RUN_ID"
PEER_ERROR_GRACE_SECONDS = 5.0


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

    def plan_memory(self) -> None:
        """Plan what each process holds, for a comparison. A stage does not fail if its plan cannot be made."""
        if self.memory.plan is None and self.program in PLANNED_STAGES:
            saves = self.storage.checkpoint_uri is not None
            try:
                from components.rlhf.runtime.planned import plan_here  # with torch, which other stages do not need

                self.memory.plan = plan_here(self.program, self.config, self.paths, checkpoints=saves)
            except Exception as error:  # whatever the planner cannot read
                self.progress.log(f"memory is not planned ({error})")

    def memory_of(self, inputs: Mapping[str, Manifest]) -> dict[str, Mapping[str, float]]:
        """Memory of the stages that wrote the inputs, by role, and of this one."""
        return {role: manifest.measurements for role, manifest in inputs.items()} | {self.name: self.measurements}

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
        self.outputs[output] = {**self.outputs[output], PUBLISHED_URI: uri}

    def write_metrics(self, path: Path, metrics: Mapping[str, float]) -> None:
        """Write the output `metrics`: a JSON file, the metadata of KFP's Metrics artifact, and final/* in MLflow."""
        if rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        self.outputs["metrics"] = dict(metrics)
        self.tracker.log({f"final/{name}": value for name, value in metrics.items()}, step=0)

    def write_report(self, output: str, path: Path, text: str) -> None:
        """Write a Markdown or HTML output, and log it to MLflow."""
        if rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(redact(text), encoding="utf-8")
        self.outputs[output] = {}
        # KFP's paths have no suffix, by which MLflow decides how to show a file.
        self.tracker.log_file(path, f"{output}.html" if text.lstrip().startswith("<!") else f"{output}.md")


def stage_program(
    name: str,
    config_class: type[Config],
    *,
    reads: Mapping[str, str],
    writes: Mapping[str, str],
    may_read: Mapping[str, str] = MappingProxyType({}),
    uses_mlflow: bool = False,
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the program of a stage, with one option per path that it reads or writes, each with its help text.

    may_read are inputs that may be missing; the function then gets None. It is called with the StageRun and the paths, by name. The
    docstring of its module is the help of the program. A function that itself uses MLflow is tracked in the same process.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        def command(settings: str, tracking: str, storage: str, executor_input: str, **paths: str | None) -> None:
            succeed = end_before_finalization(function.__module__)
            if is_launcher():
                with errors_as_lines():
                    text = settings_text(settings)
                    launch_stage(
                        name,
                        parse_config(config_class, text),
                        os.environ.get(RUN_ID, MANUAL_RUN_ID),
                        settings=text,
                        tracking=tracking,
                        storage=storage,
                        executor_input=executor_input,
                        paths=paths,
                        writes=writes,
                    )
                succeed()
                return
            worker = start_stage_worker(paths, writes, storage, executor_input) if is_worker() else None
            with stage_run(
                name,
                config_class,
                settings,
                tracking,
                storage,
                worker.executor_input if worker else executor_input,
                uses_mlflow=uses_mlflow,
                deliver=worker.deliver if worker else None,
            ) as run:
                given = worker.paths if worker else {key: Path(path) if path else None for key, path in paths.items()}
                run.program, run.paths = name, {key: path for key, path in given.items() if path is not None}
                function(run, **given)
            succeed()

        options = [
            click.option(f"--{path.replace('_', '-')}", type=click.Path(), required=path not in may_read, help=text)
            for path, text in {**reads, **may_read, **writes}.items()
        ]
        for option in reversed([*options, *STAGE_OPTIONS]):
            command = option(command)
        return click.command(help=sys.modules[function.__module__].__doc__)(command)

    return decorate


TRACKING_OPTION = click.option(
    "--tracking", default="{}", help="TrackingConfig as JSON; its uri defaults to MLFLOW_TRACKING_URI."
)
STORAGE_OPTION = click.option(
    "--storage",
    default="{}",
    help="StorageConfig as JSON: location of checkpoints and published models, and access to S3.",
)
STAGE_OPTIONS = (
    click.option("--settings", required=True, help="Settings of the stage: JSON, or the path of a JSON file."),
    TRACKING_OPTION,
    STORAGE_OPTION,
    click.option("--executor-input", default="", help="KFP's executor input as JSON; omit it when running manually."),
)


@contextlib.contextmanager
def stage_run(
    name: str,
    config_class: type[Config],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
    executor_input: str = "",
    *,
    uses_mlflow: bool = False,
    deliver: Callable[[], None] | None = None,
) -> Iterator[StageRun[Config]]:
    """Run the body of a stage. An InputError is printed as one line, with exit code 1; other errors keep their traceback.

    deliver copies the complete outputs elsewhere, before checkpoints are deleted; rank 0 calls it.
    """
    started = time.monotonic()
    run: StageRun[Config] | None = None
    redact_output()
    tracker: Tracker | None = None
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries make logs unreadable
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin on a busy core stall torch
    keep_freed_memory()
    keep_few_kernels()
    collect_old_objects_rarely()
    die_with_parent()
    stop = StopSignal()
    stop.install()
    try:
        text = settings_text(settings)
        config = parse_config(config_class, text)
        require_accelerators()
        require_writable_tmpdir()
        processes: Processes = getattr(config, "processes", Processes())
        launch_processes(name, processes)
        tracking_config = with_environment_uri(parse_config(TrackingConfig, tracking))
        storage_config = parse_config(StorageConfig, storage)
        if rank() > 0:
            tracking_config = tracking_config.model_copy(update={"enabled": False})
        run_id = os.environ.get(RUN_ID, MANUAL_RUN_ID)
        # Two tasks of one stage in a run keep their MLflow runs, checkpoints and published models apart.
        name = getattr(config, "stage_name", name)
        start = start_tracking if uses_mlflow else start_tracking_process
        tracker = start(tracking_config, run_id=run_id, stage=name, params=config.model_dump(mode="json"))
        progress = Progress(name, silent=rank() > 0)
        run = StageRun(
            name, config, without_budget(text), progress, tracker, tracking_config, run_id, storage_config, executor_input, stop,
            processes, float(os.environ.get(STARTED, started)),
        )  # fmt: skip
        yield run
        if executor_input and rank() == 0:
            write_executor_output(executor_input, run.outputs)
        if deliver and rank() == 0:
            deliver()
        for call in run.on_success:
            try:
                call()
            except (InputError, OSError) as error:  # the outputs are there: no reason to fail, and to train again
                print(f"warning: {error}", file=sys.stderr, flush=True)
        tracker.finish("FINISHED")
    except InputError as error:
        if tracker:
            tracker.finish("FAILED", str(error))
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # If all ranks fail, the first one of each node prints the error, and the launcher ends the rest.
            time.sleep(PEER_ERROR_GRACE_SECONDS)
        tell_launcher(error)
        write_termination_message(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BaseException as error:
        is_failure = isinstance(error, Exception)  # not a signal or the end of the launcher of several processes
        if tracker:
            tracker.finish("FAILED", message_of(error) if is_failure else "")
        if "WORLD_SIZE" in os.environ and isinstance(error, RuntimeError):
            time.sleep(PEER_ERROR_GRACE_SECONDS)  # may be caused by a lost peer, whose own error is to be printed first
        if is_failure:
            tell_launcher(error)
            write_termination_message(error)
        raise
    finally:
        for call in run.on_end if run else ():
            with contextlib.suppress(Exception):  # what it would have released expires
                call()


def require_writable_tmpdir() -> None:
    """Raise InputError if temporary files cannot be written where TMPDIR says; Python would silently write them elsewhere."""
    folder = os.environ.get("TMPDIR")
    if folder and not os.access(folder, os.W_OK):
        raise InputError(
            f"TMPDIR is {folder}, which user {os.getuid()} cannot write; correct it, or, for the scratch of a profile, use a storage class "
            "to whose volumes all users can write."
        )


def parse_config(config_class: type[Config], text: str) -> Config:
    """Parse settings. Raises InputError."""
    try:
        return config_class.from_json(text)
    except ValidationError as error:
        raise InputError(f"Settings: {explain_validation_error(error, config_class)}") from None


def settings_text(settings: str) -> str:
    """The JSON text of --settings, which is the text or the path of a file. Raises InputError."""
    return settings if settings.lstrip().startswith("{") else _read(settings)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--settings {path} is neither JSON nor a readable file ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"--settings {path} is not UTF-8; save it as UTF-8.") from None
