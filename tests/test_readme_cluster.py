"""The cluster commands of README.md and manifests/README.md, run in order in a copy of the repository, without a cluster.

docker, kind and kubectl are stand-ins that do what needs no cluster and check the rest. The kubectl and kfp-rlhf commands of the
other pages are checked for unknown commands and options.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pipelines.__main__ import cli
from pipelines.cluster.server import MIN_VERSION
from tests.support.kfp_api import KfpApi, serving
from tests.support.overlays import KUBECTL
from tests.support.toy_pipeline import write_data

ROOT = Path(__file__).resolve().parents[1]


def scripts(text: str) -> list[str]:
    """The shell commands of a page: its fenced sh blocks, then its indented blocks."""
    fenced = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^(?: {4}.*)?\n)+", rest, flags=re.MULTILINE)
    return [
        block.strip()
        for block in (*fenced, *(re.sub(r"^ {4}", "", b, flags=re.MULTILINE) for b in indented))
        if block.strip()
    ]


def script_of(page: str, title: str) -> str:
    """The one script of a section."""
    section = re.search(rf"\n## {title}\n(.*?)\n## ", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert section, f"{page} has no section {title}"
    (script,) = scripts(section[1])
    return script


@dataclass(frozen=True)
class Played:
    calls: list[tuple[str, str]]
    api: KfpApi
    folder: Path
    stdout: str

    def of(self, kind: str) -> list[str]:
        """What the stand-ins recorded under this name, in order."""
        return [value for name, value in self.calls if name == kind]

    def applied(self) -> list[dict[str, Any]]:
        """The objects of the overlay that was applied."""
        (text,) = [value for value in self.of("applied") if not value.startswith("github.com/")]
        return [found for found in yaml.safe_load_all(text) if found]

    def images_of_tasks(self) -> set[str]:
        (version,) = self.api.versions.values()
        executors = version["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
        return {executor["container"]["image"] for executor in executors.values()}

    def images_of_servers(self) -> set[str]:
        return set(re.findall(r"image: (\S+)", "".join(self.of("applied"))))


Play = Callable[[str], Played]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs a script with bash -e. docker, kind and kubectl are stand-ins; kfp-rlhf and python are those of this environment."""
    folder, bin_folder = tmp_path / "copy", tmp_path / "bin"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "*.env", "identities.json")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "data").mkdir()
    write_data(folder / "data")
    bin_folder.mkdir()
    for name in ("docker", "kind", "kubectl"):
        write_command(bin_folder / name, f'exec {sys.executable} {ROOT}/tests/support/stand_in_commands.py {name} "$@"')
    write_command(bin_folder / "kfp-rlhf", 'exec python -m pipelines "$@"')

    def run(script: str) -> Played:
        api = KfpApi()
        api.behind_ui, api.states = True, ["SUCCEEDED"]
        shared = tmp_path / "shared"
        with serving(api) as address:
            # Replace the forwarded ports: KFP by the server of this test, S3 by a folder that is declared as a claim.
            write_command(
                bin_folder / "python",
                f'grep -q "port-forward service/ml-pipeline-ui 8080:80" "$CALLS" || exit 9\n'
                f"echo $AWS_ACCESS_KEY_ID $AWS_SECRET_ACCESS_KEY $AWS_ENDPOINT_URL_S3 > {tmp_path}/credentials\n"
                f'set -- "${{@/#http:\\/\\/localhost:8080/{address}}}"\n'
                f'set -- "${{@/#storage.uri=s3:\\/\\/rlhf/storage.uri={shared}}}"\n'
                f'exec {sys.executable} "$@" --set "cluster.claims={{{shared}: shared}}"',
            )
            environment = {
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "CALLS": str(tmp_path / "calls"),
                "KUBECTL": str(KUBECTL),
            }
            # Wait for background processes, so that a port-forward is recorded before the next command.
            waited = re.sub(r"&$", "& wait", script, flags=re.MULTILINE)
            done = subprocess.run(
                ["bash", "-euc", waited], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / "calls").read_text().splitlines()
        return Played([tuple(json.loads(line)) for line in lines], api, tmp_path, done.stdout)

    return run


def write_command(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_commands_for_kind_lead_from_nothing_to_a_run(play: Play) -> None:
    install = script_of("manifests/README.md", "Kubeflow Pipelines on kind")
    played = play(f"{install}\n{script_of('README.md', 'On a cluster')}")
    assert len(played.api.runs) == 1 and "state    succeeded" in played.stdout
    built = {image for image in played.images_of_servers() if image.startswith("kfp-rlhf/")}
    assert built | played.images_of_tasks() == set(played.of("loaded"))
    upstream = [url for url in played.of("applied") if url.startswith("github.com/kubeflow/pipelines/")]
    assert len(upstream) == 2
    for url in upstream:
        version = re.search(r"\?ref=(\d+)\.(\d+)\.\d+$", url)
        assert version and tuple(map(int, version.groups())) >= MIN_VERSION
    assert_named_objects_exist(played)


def test_commands_for_a_cluster_with_gpus_and_a_registry_lead_to_a_run(play: Play) -> None:
    played = play(script_of("manifests/README.md", "Your own cluster, with GPUs"))
    assert len(played.api.runs) == 1 and "state    succeeded" in played.stdout
    built = {image for image in played.images_of_servers() if "kfp-rlhf" in image}
    assert built | played.images_of_tasks() == set(played.of("pushed"))
    assert {image.split("/")[0] for image in built} == {"registry.example.com"}
    assert len(list((played.folder / "shared").rglob("*.jsonl"))) == 3
    secret = (played.folder / "copy/manifests/overlays/standalone/secrets/rlhf-s3.env").read_text()
    values = dict(line.split("=", 1) for line in secret.splitlines())
    expected = f"{values['AWS_ACCESS_KEY_ID']} {values['AWS_SECRET_ACCESS_KEY']} http://localhost:8333\n"
    assert (played.folder / "credentials").read_text() == expected
    assert_named_objects_exist(played)


def assert_named_objects_exist(played: Played) -> None:
    """Objects that kubectl names are in the overlay or part of Kubeflow Pipelines, and label selectors match the tasks."""
    objects = {
        (found["metadata"].get("namespace"), f"{found['kind'].lower()}/{found['metadata']['name']}"): found
        for found in played.applied()
    }
    (version,) = played.api.versions.values()
    pods = version["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    checked = 0
    for call in played.of("kubectl"):
        words = shlex.split(call)
        namespace = words[1] if words[0] == "-n" else None
        for name in [word for word in words if re.fullmatch(r"(job|deployment|service|statefulset)/\S+", word)]:
            assert (namespace, name) in objects or name == "service/ml-pipeline-ui", call
            checked += 1
            port = re.search(rf"port-forward {name} (\d+)$", call)
            if port:
                assert int(port.group(1)) in {p["port"] for p in objects[namespace, name]["spec"]["ports"]}
        if "-l" in words:
            key, value = words[words.index("-l") + 1].split("=")
            assert all(pod["podMetadata"]["labels"][key] == value for pod in pods)
    assert checked >= 2


@pytest.mark.parametrize("page", ["README.md", "manifests/README.md", "pipelines/README.md"])
def test_kubectl_has_every_command_and_option(page: str, tmp_path: Path) -> None:
    script = "\n".join(scripts((ROOT / page).read_text(encoding="utf-8"))).replace("\\\n", " ")
    commands = [line for line in script.splitlines() if line.startswith("kubectl ") and " apply -k " not in line]
    assert commands
    environment = os.environ | {"CALLS": str(tmp_path / "calls"), "KUBECTL": str(KUBECTL)}
    for line in commands:
        words = shlex.split(line, comments=True)
        words = words[: words.index("&")] if "&" in words else words
        command = [sys.executable, ROOT / "tests" / "support" / "stand_in_commands.py", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_kfp_rlhf_has_every_command_and_option() -> None:
    checked = 0
    for page in (
        "README.md",
        "components/README.md",
        "manifests/README.md",
        "pipelines/README.md",
        "pipelines/params/README.md",
    ):
        text = "\n".join(scripts((ROOT / page).read_text(encoding="utf-8"))).replace("\\\n", " ")
        for line in re.findall(r"(?:^|\$\()(?:python -m pipelines|kfp-rlhf) ([^\n)]+)", text, flags=re.MULTILINE):
            name, *arguments = shlex.split(line.replace("|", " "), comments=True)
            if name == "run" and arguments[:1] == ["compile"]:  # run|compile|submit
                continue
            command: click.Command = cli
            while isinstance(command, click.Group):
                command = command.commands[name]
                if isinstance(command, click.Group):
                    name, *arguments = arguments
            command.make_context(name, [a.strip("[]") for a in arguments])  # raises an error for unknown options
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    "command", ["wait --for=x --patience=1 job/x", "rollout stats deployment/x", "rollot status deployment/x"]
)
def test_stand_in_rejects_unknown_commands_and_options(command: str, tmp_path: Path) -> None:
    environment = os.environ | {"CALLS": str(tmp_path / "calls"), "KUBECTL": str(KUBECTL)}
    stand_in = [sys.executable, ROOT / "tests" / "support" / "stand_in_commands.py", "kubectl"]
    assert subprocess.run([*stand_in, *command.split()], env=environment, capture_output=True).returncode == 1
