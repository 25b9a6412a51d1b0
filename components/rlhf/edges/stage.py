"""What every stage program does at its edges: options, settings, tracking, errors, and KFP's executor output."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import click
from pydantic import ValidationError

from components.rlhf.artifacts.directory import writing
from components.rlhf.artifacts.manifest import MANIFEST, Manifest, write_manifest
from components.rlhf.config.base import Settings
from components.rlhf.config.model import TrainingSettings
from components.rlhf.config.params import explain
from components.rlhf.config.storage import StorageSettings, TrackingSettings
from components.rlhf.edges.fetch import upload_all
from components.rlhf.edges.kfp_io import output_uri, write_executor_output
from components.rlhf.edges.process import Stop, die_with_parent, keep_freed_memory
from components.rlhf.edges.progress import Progress
from components.rlhf.edges.secrets import redact, redact_output
from components.rlhf.edges.storage import Store, open_store
from components.rlhf.edges.tracking import BY_HAND, Tracker, from_environment, start_tracking
from components.rlhf.errors import InputError

S = TypeVar("S", bound=Settings)
RUN_ID = "RLHF_RUN_ID"
SECONDS_FOR_THE_FIRST = 5.0


def rank() -> int:
    """Which of the processes of this stage this is."""
    return int(os.environ.get("RANK", "0"))


@dataclass
class StageRun(Generic[S]):
    """What a stage works with; outputs are reported to KFP when it ends well."""

    name: str
    settings: S
    settings_text: str
    progress: Progress
    tracker: Tracker
    storage: StorageSettings = field(default_factory=StorageSettings)
    executor_input: str = ""
    stop: Stop = field(default_factory=Stop)
    published: dict[str, str] = field(default_factory=dict)  # output -> the URI that KFP is told instead of its own
    outputs: dict[str, Mapping[str, str | int | float]] = field(default_factory=dict)
    afterwards: list[Callable[[], None]] = field(default_factory=list)  # when the outputs have been reported

    def checkpoint_store(self) -> Store | None:
        """Where this stage keeps what it needs to go on after a death; None is nowhere."""
        uri = self.storage.checkpoint_uri
        return open_store(uri, self.storage, self.progress.say) if uri else None

    def wrote(self, output: str, manifest: Manifest) -> None:
        """Report an artifact with its manifest as metadata."""
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
    ) -> None:
        """Write an artifact whole or not at all: fill(folder) makes its files, then comes the manifest.

        parents are the inputs by their role; tokenizer_of is the one whose tokenizer the artifact goes with. Of several
        processes the first writes.
        """
        if rank() > 0:
            return
        with writing(path) as draft:
            fill(draft)
            manifest = write_manifest(
                draft,
                kind=kind,
                settings=self.settings_text,
                parents={role: parent.digest for role, parent in parents.items()},
                tokenizer_digest=tokenizer_of.tokenizer_digest if tokenizer_of else "",
                chat_template_digest=tokenizer_of.chat_template_digest if tokenizer_of else "",
                facts=facts,
            )
        self.wrote(output, manifest)
        if kind.endswith("_model"):
            self._publish(output, path)

    def _publish(self, output: str, path: Path) -> None:
        """Copy a finished model to storage.publish_uri. On a cluster KFP is told that place, and makes no copy of its own."""
        if self.storage.publish_uri is None:
            return
        key = f"{os.environ.get(RUN_ID, 'by-hand')}/{self.name}/{output}"
        uri = f"{self.storage.publish_uri.rstrip('/')}/{key}"
        upload_all(open_store(self.storage.publish_uri, self.storage, self.progress.say), path, key, last=MANIFEST)
        self.progress.say(f"published as {uri}")
        self.outputs[output] = {**self.outputs[output], "published_uri": uri}
        # On a laptop the next stage reads the folder itself, and would look for the URI in vain.
        kept = output_uri(self.executor_input, output) if self.executor_input else ""
        if "://" in kept and not kept.startswith("file://") and uri.startswith("s3://"):
            self.published[output] = uri

    def wrote_metrics(self, path: Path, metrics: Mapping[str, float]) -> None:
        """Write final numbers as the output `metrics`: a JSON file, KFP's Metrics artifact, and a last point in MLflow."""
        if rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        self.outputs["metrics"] = dict(metrics)
        self.tracker.log({f"final/{name}": value for name, value in metrics.items()}, step=0)

    def wrote_report(self, output: str, path: Path, text: str) -> None:
        """Write a Markdown or HTML output, and keep a copy in MLflow."""
        if rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(redact(text), encoding="utf-8")
        self.outputs[output] = {}
        self.tracker.log_file(path)


def stage_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every stage has."""
    for option in (
        click.option("--executor-input", default="", help="KFP's executor input; leave it out when running by hand."),
        click.option(
            "--tracking",
            default="{}",
            help="Tracking settings as JSON; nothing is tracked without a uri in them or in MLFLOW_TRACKING_URI.",
        ),
        click.option("--settings", required=True, help="The stage's settings: JSON text, or a file that holds it."),
    ):
        command = option(command)
    return command


def input_folder(*names: str, required: bool = True) -> Callable[..., Any]:
    """An option that names an artifact to read."""
    return click.option(*names, type=click.Path(path_type=Path), required=required, help="Artifact to read.")


def output_path(*names: str) -> Callable[..., Any]:
    """An option that names what to write."""
    return click.option(*names, type=click.Path(path_type=Path), required=True, help="Where to write.")


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where checkpoints and published models lie, and how S3 is reached."""
    return click.option(
        "--storage",
        default="{}",
        help="Storage settings as JSON; with a checkpoint_uri a training stage that is started again continues from there.",
    )(command)


@contextlib.contextmanager
def stage_run(
    name: str, model: type[S], *, settings: str, tracking: str, executor_input: str, storage: str = "{}"
) -> Iterator[StageRun[S]]:
    """Run the body of a stage. An InputError becomes one line on stderr and exit code 1; other errors keep their traceback."""
    redact_output()
    tracker: Tracker | None = None
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars would drown ours, and make logs unreadable
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin on a busy core stall torch
    keep_freed_memory()
    die_with_parent()
    stop = Stop()
    stop.install()
    try:
        text = settings if settings.lstrip().startswith("{") else _read(settings)
        parsed = parse_settings(model, text)
        start_processes(getattr(getattr(parsed, name, None), "training", None))
        track = from_environment(parse_settings(TrackingSettings, tracking))
        stored = parse_settings(StorageSettings, storage)
        if rank() > 0:
            track = track.model_copy(update={"enabled": False})  # one process speaks for all
        run_id = os.environ.get(RUN_ID, BY_HAND)
        tracker = start_tracking(track, run_id=run_id, stage=name, params=parsed.model_dump(mode="json"))
        progress = Progress(name, silent=rank() > 0)
        run = StageRun(
            name=name,
            settings=parsed,
            settings_text=text,
            progress=progress,
            tracker=tracker,
            storage=stored,
            executor_input=executor_input,
            stop=stop,
        )
        yield run
        if executor_input and rank() == 0:
            write_executor_output(executor_input, run.outputs, run.published)
        for call in run.afterwards:
            call()
        tracker.finish("FINISHED")
    except InputError as error:
        if tracker:
            tracker.finish("FAILED")
        if rank() > 0:
            time.sleep(SECONDS_FOR_THE_FIRST)  # where all fail alike, one says so, and the launcher ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BaseException as error:
        if tracker:
            tracker.finish("FAILED")
        if "WORLD_SIZE" in os.environ and isinstance(error, RuntimeError):
            time.sleep(
                SECONDS_FOR_THE_FIRST
            )  # losing another process looks like this: that one is to be heard, and ends us
        raise


def start_processes(training: TrainingSettings | None) -> None:
    """Where the settings ask for several processes and this is not one of them yet: start them, and end as they end."""
    if training and training.num_processes > 1 and "WORLD_SIZE" not in os.environ:
        from components.rlhf.edges.launcher import launch  # imports torch

        sys.exit(launch(training.num_processes))


def parse_settings(model: type[S], text: str) -> S:
    try:
        return model.from_json(text)
    except ValidationError as error:
        raise InputError(f"Settings: {explain(error, model)}") from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--settings {path} is neither JSON text nor a readable file ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"--settings {path} is not UTF-8; save it as UTF-8.") from None
