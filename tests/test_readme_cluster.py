"""The commands of README.md's cluster section, in order, in a copy of the repository: what needs no cluster runs, and the rest is checked.

Commands for a cluster that stand in other pages are checked for options that kubectl does not have.
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

import pytest
import yaml

from pipelines.__main__ import cli
from pipelines.cluster.server import MINIMUM
from tests.support.kfp_api import KfpApi, serving
from tests.support.overlays import KUBECTL
from tests.support.toy_pipeline import write_data

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.search(r"\n## On a cluster\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def blocks(text: str) -> list[str]:
    """The indented blocks of a page, each as a script."""
    found = re.findall(r"(?:^(?: {4}.*)?\n)+", text, flags=re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip() for block in found if block.strip()]


@dataclass(frozen=True)
class Played:
    calls: list[tuple[str, str]]
    api: KfpApi
    folder: Path
    stdout: str

    def of(self, kind: str) -> list[str]:
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
    """Runs a script with bash -e, where docker, kind and kubectl are stand-ins, and python is this one."""
    folder, bin_folder = tmp_path / "copy", tmp_path / "bin"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "*.env", "identities.json")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "data").mkdir()
    write_data(folder / "data")
    bin_folder.mkdir()
    for name in ("docker", "kind", "kubectl"):
        _write(bin_folder / name, f'exec {sys.executable} {ROOT}/tests/support/stand_in_commands.py {name} "$@"')

    def run(script: str) -> Played:
        api = KfpApi()
        api.behind_ui, api.states = True, ["SUCCEEDED"]
        shared = tmp_path / "shared"
        with serving(api) as address:
            # The forwarded ports: the server of this test, and for S3 a folder that a claim could be.
            _write(
                bin_folder / "python",
                f'grep -q "port-forward service/ml-pipeline-ui 8080:80" "$CALLS" || exit 9\n'
                f"echo $AWS_ACCESS_KEY_ID $AWS_SECRET_ACCESS_KEY $AWS_ENDPOINT_URL_S3 > {tmp_path}/credentials\n"
                f'set -- "${{@/#http:\\/\\/localhost:8080/{address}}}"\n'
                f'set -- "${{@/#storage.uri=s3:\\/\\/rlhf\\/data/storage.uri={shared}}}"\n'
                f'exec {sys.executable} "$@" --set "cluster.claims={{{shared}: shared}}"',
            )
            environment = {
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "CALLS": str(tmp_path / "calls"),
                "KUBECTL": str(KUBECTL),
            }
            # Processes in the background have answered before the next line, as port-forward has on a cluster.
            waited = re.sub(r"&$", "& wait", script, flags=re.MULTILINE)
            done = subprocess.run(
                ["bash", "-euc", waited], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / "calls").read_text().splitlines()
        return Played([tuple(json.loads(line)) for line in lines], api, tmp_path, done.stdout)

    return run


def _write(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def section() -> list[str]:
    assert SECTION is not None
    return blocks(SECTION.group(1))


def test_from_an_empty_cluster_to_a_run(play: Play) -> None:
    played = play(section()[0])
    assert len(played.api.runs) == 1 and "state    succeeded" in played.stdout
    ours = {image for image in played.images_of_servers() if image.startswith("kfp-rlhf/")}
    assert ours | played.images_of_tasks() == set(played.of("loaded"))
    upstream = [place for place in played.of("applied") if place.startswith("github.com/kubeflow/pipelines/")]
    assert len(upstream) == 2
    for place in upstream:
        version = re.search(r"\?ref=(\d+)\.(\d+)\.\d+$", place)
        assert version and tuple(map(int, version.groups())) >= MINIMUM
    assert_names_are_there(played)


def test_on_a_cluster_with_gpus_and_a_registry(play: Play) -> None:
    played = play(section()[1])
    assert len(played.api.runs) == 1 and "state    succeeded" in played.stdout
    ours = {image for image in played.images_of_servers() if "kfp-rlhf" in image}
    assert ours | played.images_of_tasks() == set(played.of("pushed"))
    assert {image.split("/")[0] for image in ours} == {"registry.example.com"}
    assert len(list((played.folder / "shared").rglob("*.jsonl"))) == 3
    secret = (played.folder / "copy/manifests/overlays/standalone/secrets/rlhf-s3.env").read_text()
    values = dict(line.split("=", 1) for line in secret.splitlines())
    expected = f"{values['AWS_ACCESS_KEY_ID']} {values['AWS_SECRET_ACCESS_KEY']} http://localhost:8333\n"
    assert (played.folder / "credentials").read_text() == expected
    assert_names_are_there(played)


def assert_names_are_there(played: Played) -> None:
    """What kubectl is asked for by name is in the overlay, or comes with Kubeflow Pipelines; labels are those of the tasks."""
    there = {
        (found["metadata"].get("namespace"), f"{found['kind'].lower()}/{found['metadata']['name']}"): found
        for found in played.applied()
    }
    (version,) = played.api.versions.values()
    pods = version["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    asked = 0
    for call in played.of("kubectl"):
        words = shlex.split(call)
        namespace = words[1] if words[0] == "-n" else None
        for name in [word for word in words if re.fullmatch(r"(job|deployment|service|statefulset)/\S+", word)]:
            assert (namespace, name) in there or name == "service/ml-pipeline-ui", call
            asked += 1
            port = re.search(rf"port-forward {name} (\d+)$", call)
            if port:
                assert int(port.group(1)) in {p["port"] for p in there[namespace, name]["spec"]["ports"]}
        if "-l" in words:
            key, value = words[words.index("-l") + 1].split("=")
            assert all(pod["podMetadata"]["labels"][key] == value for pod in pods)
    assert asked >= 2


@pytest.mark.parametrize("page", ["README.md", "manifests/README.md", "pipelines/README.md"])
def test_kubectl_has_every_command_and_option(page: str, tmp_path: Path) -> None:
    script = "\n".join(blocks((ROOT / page).read_text(encoding="utf-8"))).replace("\\\n", " ")
    commands = [line for line in script.splitlines() if line.startswith("kubectl ") and " apply -k " not in line]
    assert commands
    environment = os.environ | {"CALLS": str(tmp_path / "calls"), "KUBECTL": str(KUBECTL)}
    for line in commands:
        words = shlex.split(line, comments=True)
        words = words[: words.index("&")] if "&" in words else words
        command = [sys.executable, ROOT / "tests" / "support" / "stand_in_commands.py", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_command_line_has_every_command_and_option() -> None:
    checked = 0
    for page in ("README.md", "manifests/README.md", "pipelines/README.md", "pipelines/params/README.md"):
        script = "\n".join(blocks((ROOT / page).read_text(encoding="utf-8"))).replace("\\\n", " ")
        for line in re.findall(r"^python -m pipelines (.+)$", script, flags=re.MULTILINE):
            name, *arguments = shlex.split(line.replace("|", " "), comments=True)
            if name == "run" and arguments[:1] == ["compile"]:  # run|compile|submit
                continue
            cli.commands[name].make_context(name, [a.strip("[]") for a in arguments])  # raises for what is not there
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    "command", ["wait --for=x --patience=1 job/x", "rollout stats deployment/x", "rollot status deployment/x"]
)
def test_a_wrong_command_is_seen(command: str, tmp_path: Path) -> None:
    environment = os.environ | {"CALLS": str(tmp_path / "calls"), "KUBECTL": str(KUBECTL)}
    stand_in = [sys.executable, ROOT / "tests" / "support" / "stand_in_commands.py", "kubectl"]
    assert subprocess.run([*stand_in, *command.split()], env=environment, capture_output=True).returncode == 1
