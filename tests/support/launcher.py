"""A model of Kubeflow Pipelines' driver and launcher: one task of a compiled pipeline as a container under podman.

The rules are those of kubeflow/pipelines 2.17: backend/src/v2/component/launcher_v2.go (inputs are downloaded before the program starts,
outputs uploaded afterwards; the executor output is parsed strictly; a URI outside of the pipeline root fails the task),
backend/src/v2/objectstore (LocalPathForURI) and argocompiler/container.go (the folders /minio, /s3, ... are emptyDirs). It is a model,
not a test of a cluster: artifacts are in a folder in place of an object store.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.support.compiled_pipelines import CompiledPipeline
from tests.support.podman import podman

BUCKET = "minio://mlpipeline/"
EMPTY_DIRS = ("/minio", "/s3", "/gcs", "/.local", "/.cache", "/.config", "/tmp")
USER = 1000


class LauncherError(Exception):
    """The launcher fails the task after its program has succeeded."""


@dataclass
class Artifact:
    uri: str
    title: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class TaskResult:
    exit_code: int
    log: str
    termination_message: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass
class Platform:
    """Runs tasks of one pipeline. store is the object store, claims are volumes by name, secrets are Secrets by name."""

    compiled: CompiledPipeline
    folder: Path
    run_id: str
    images: dict[str, str]  # stage -> image
    network: str = "none"
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    claims: dict[str, Path] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return f"{BUCKET}v2/artifacts/rlhf/{self.run_id}"

    def stored(self, uri: str) -> Path:
        return self.folder / "store" / uri.removeprefix(BUCKET)

    def run(self, task: str, executor: str, inputs: dict[str, Any]) -> TaskResult:
        """Run one task. inputs are Artifacts and values of parameters by name."""
        pod = self.folder / "pods" / task
        for name in EMPTY_DIRS:
            (pod / name.strip("/")).mkdir(parents=True)
            (pod / name.strip("/")).chmod(0o777)  # of root, as an emptyDir
        log = pod / "termination-log"
        log.touch()
        log.chmod(0o666)
        component = self._component(executor)
        executor_input = self._executor_input(task, component, inputs)
        for artifact in inputs.values():
            if isinstance(artifact, Artifact):
                _copy(self.stored(artifact.uri), self._local(pod, artifact.uri))
        for outputs in executor_input["outputs"]["artifacts"].values():  # prepareOutputFolders
            _make_folders(self._local(pod, outputs["artifacts"][0]["uri"]).parent, pod)
        for output in executor_input["outputs"]["parameters"].values():
            _make_folders((pod / output["outputFile"].strip("/")).parent, pod)
        done = podman("run", *self._options(task, executor, pod), check=False)
        result = TaskResult(done.returncode, done.stdout + done.stderr, log.read_text())
        if done.returncode == 0:
            self._collect(pod, executor_input, result)
        shutil.rmtree(pod)
        return result

    def _component(self, executor: str) -> dict[str, Any]:
        (found,) = [
            c for c in self.compiled.spec["components"].values() if c.get("executorLabel") == f"exec-{executor}"
        ]
        return found

    def _executor_input(self, task: str, component: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        def entry(name: str, artifact: Artifact) -> dict[str, Any]:
            kind = {"schemaTitle": artifact.title, "schemaVersion": "0.0.1"}
            return {"artifacts": [{"name": name, "uri": artifact.uri, "type": kind, "metadata": artifact.metadata}]}

        definitions = component.get("outputDefinitions", {})
        outputs = {
            name: Artifact(
                f"{self.root}/{task}/{name}", definition["artifactType"]["schemaTitle"], {"display_name": name}
            )
            for name, definition in definitions.get("artifacts", {}).items()
        }
        task_root = f"/minio/mlpipeline/v2/artifacts/rlhf/{self.run_id}/{task}"
        self._input = {
            "inputs": {
                "artifacts": {n: entry(n, a) for n, a in inputs.items() if isinstance(a, Artifact)},
                "parameterValues": {n: v for n, v in inputs.items() if not isinstance(v, Artifact)},
            },
            "outputs": {
                "artifacts": {name: entry(name, artifact) for name, artifact in outputs.items()},
                "parameters": {n: {"outputFile": f"{task_root}/{n}"} for n in definitions.get("parameters", {})},
                "outputFile": f"{task_root}/output_metadata.json",
            },
        }
        return self._input

    def _options(self, task: str, executor: str, pod: Path) -> list[str]:
        container, spec = self.compiled.containers[executor], self.compiled.pods[executor]
        security = spec["securityContext"]
        options = [
            "--rm",
            f"--network={self.network}",
            "--read-only",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
        ]
        options += [f"--user={security['runAsUser']}:{security['runAsGroup']}", "--unsetenv=HOME", "--shm-size=256m"]
        options += [f"--volume={pod / name.strip('/')}:{name}" for name in EMPTY_DIRS]
        options += [f"--volume={pod}/termination-log:/dev/termination-log"]
        options += [
            f"--volume={self.claims[mount['pvcNameParameter']['runtimeValue']['constant']]}:{mount['mountPath']}"
            for mount in spec.get("pvcMount", [])
        ]
        variables = {e["name"]: e["value"] for e in container.get("env", [])}
        variables |= {e["name"]: self.run_id for e in spec["fieldPathAsEnv"] if "runid" in e["fieldPath"]}
        for secret in spec.get("secretAsEnv", []):
            values = self.secrets.get(secret["secretNameParameter"]["runtimeValue"]["constant"], {})
            for pair in secret["keyToEnv"]:
                assert secret.get("optional") or pair["secretKey"] in values
                variables |= {pair["envVar"]: values[pair["secretKey"]]} if pair["secretKey"] in values else {}
        options += [f"--env={name}={value}" for name, value in variables.items()]
        return [*options, self.images[executor], *container["command"], *map(self._resolve, container["args"])]

    def _resolve(self, argument: str) -> str:
        """getPlaceholders of launcher_v2.go, for the placeholders that container_spec uses."""
        inputs, outputs = self._input["inputs"], self._input["outputs"]
        values = {"{{$}}": json.dumps(self._input)}
        for kind, section in (("inputs", inputs), ("outputs", outputs)):
            for name, artifacts in section["artifacts"].items():
                uri = artifacts["artifacts"][0]["uri"]
                values[f"{{{{$.{kind}.artifacts['{name}'].path}}}}"] = f"/{uri.replace('://', '/')}"
        for name, value in inputs["parameterValues"].items():
            values[f"{{{{$.inputs.parameters['{name}']}}}}"] = value if isinstance(value, str) else json.dumps(value)
        for name, output in outputs["parameters"].items():
            values[f"{{{{$.outputs.parameters['{name}'].output_file}}}}"] = output["outputFile"]
        for placeholder, value in values.items():
            if argument == placeholder:
                return value
        assert "{{$" not in argument, f"the launcher would leave {argument}"
        return argument

    def _local(self, pod: Path, uri: str) -> Path:
        return pod / uri.replace("://", "/")

    def _collect(self, pod: Path, executor_input: dict[str, Any], result: TaskResult) -> None:
        """Upload the artifacts and read the parameters. Raises LauncherError where the launcher fails the task."""
        outputs = executor_input["outputs"]
        file = pod / outputs["outputFile"].strip("/")
        reported = pipeline_spec_pb2.ExecutorOutput()
        if file.is_file():
            try:
                json_format.Parse(file.read_text(), reported, ignore_unknown_fields=False)
            except json_format.ParseError as error:
                raise LauncherError(f"executor output: {error}") from error
        for name, artifacts in outputs["artifacts"].items():
            (declared,) = artifacts["artifacts"]
            merged = Artifact(declared["uri"], declared["type"]["schemaTitle"], dict(declared["metadata"]))
            if name in reported.artifacts and reported.artifacts[name].artifacts:
                runtime = reported.artifacts[name].artifacts[0]
                merged.uri = runtime.uri or merged.uri
                merged.metadata |= json_format.MessageToDict(runtime.metadata)
            if any(value is None for value in merged.metadata.values()):
                raise LauncherError(f"metadata of {name} is null")
            if not merged.uri.startswith(f"{BUCKET}"):  # KeyFromURI
                raise LauncherError(
                    f"failed to upload output artifact {name}: {merged.uri} does not have expected bucket prefix"
                )
            path = self._local(pod, merged.uri)
            if path.exists():
                _copy(path, self.stored(merged.uri), as_user=False)
            result.artifacts[name] = merged
        for name, output in outputs["parameters"].items():
            path = pod / output["outputFile"].strip("/")
            if not path.is_file():
                raise LauncherError(f"failed to read output parameter {name}")
            result.parameters[name] = path.read_text()


def _copy(source: Path, target: Path, *, as_user: bool = True) -> None:
    """As through an object store: files only, one mode, no empty folders. The launcher runs as the user of the stage."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    for file in files:
        path = target if source.is_file() else target / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)
        path.chmod(0o644)
    if as_user and target.exists():
        for path in [target, *target.rglob("*")]:
            os.chown(path, USER, USER)


def _make_folders(folder: Path, pod: Path) -> None:
    """os.MkdirAll of the launcher below an emptyDir."""
    missing = []
    while not folder.exists() and folder != pod:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(mode=0o755)
        os.chown(path, USER, USER)
